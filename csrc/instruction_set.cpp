#include "instruction_set.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace vmm {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

InstructionSet best() {
#ifdef VMM_HAVE_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return InstructionSet::avx512;
#endif
#ifdef VMM_HAVE_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

}  // namespace

const char* name(InstructionSet set) { return kNames[static_cast<int>(set)]; }

// Read anew at each call, so that a test can force each set in turn within one process.
InstructionSet current_instruction_set() {
  static const InstructionSet limit = best();
  const char* wanted = std::getenv("VMM_FAST_ISA");
  if (!wanted || !*wanted) return limit;
  for (int set = 0; set <= static_cast<int>(limit); set++)
    if (!std::strcmp(wanted, kNames[set])) return static_cast<InstructionSet>(set);
  throw std::invalid_argument(
      std::string("VMM_FAST_ISA is '") + wanted +
      "', which is not an instruction set of this machine; it must be one of "
      "baseline, avx2, avx512, up to " +
      name(limit));
}

}  // namespace vmm
