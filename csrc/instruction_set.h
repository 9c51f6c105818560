// The choice of the kernels' copy that runs: their source is compiled once per instruction set.
#pragma once

namespace vmm {

enum class InstructionSet { baseline, avx2, avx512 };

// The best that the machine has, or the one that the environment variable VMM_FAST_ISA names.
// Throws std::invalid_argument for a name that is unknown or that this machine cannot run.
InstructionSet current_instruction_set();

const char* name(InstructionSet);

// The copy that runs: Kernels is a struct of functions, with a static member function for each set
// that returns what was compiled for it.
template <class Kernels>
const Kernels& current_kernels() {
  switch (current_instruction_set()) {
#ifdef VMM_HAVE_avx512
    case InstructionSet::avx512:
      return Kernels::avx512();
#endif
#ifdef VMM_HAVE_avx2
    case InstructionSet::avx2:
      return Kernels::avx2();
#endif
    default:
      return Kernels::baseline();
  }
}

}  // namespace vmm
