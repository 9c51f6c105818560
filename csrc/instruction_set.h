// Which instruction set's copy of the kernels runs: they are one source, compiled once per set.
#pragma once

namespace vmm {

enum class InstructionSet { baseline, avx2, avx512 };

// The best that the machine has, or the one that the environment variable VMM_FAST_ISA names.
// Throws std::invalid_argument for a name that is unknown or that this machine cannot run.
InstructionSet current_instruction_set();

const char* name(InstructionSet);

}  // namespace vmm
