"""Numbers that stand in C++, in Triton and in Python are the same in all of them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Where each is written, by folder; every folder has it at least once.
CONSTANTS = {
    "floor of log weights": {
        "csrc": r"kLogWeightFloor = (\S+);",
        "vmm_fast": r"\bLOG_WEIGHT_FLOOR = (\S+)",
    },
    "condition from which on float32 does not suffice": {
        "csrc": r"kFloat32Condition = (\S+);",
        "vmm_fast": r"\b_FLOAT32_CONDITION = (\S+)",
    },
    "softplus is the identity from here on": {
        "csrc": r"kSoftplusLinear = (\S+);",
        "kernels": r"tl\.where\(x > (\S+), (?:x, value|1\.0, e )",
    },
    "least mean and inverse dispersion of counts": {
        "csrc": r"constexpr double kLeast = (\S+);",
        "kernels": r"^LEAST = tl\.constexpr\((\S+)\)",
        "vmm_fast": r"^LEAST = (\S+)",
    },
    "rounding errors that a pivot may be": {
        "csrc": r"largest \* \((\d+) \* \(sizeof",
        "vmm_fast": r"> (\d+) \* torch\.finfo\S+ \* largest",
    },
    "largest concentration": {
        "csrc": r"high = std::log\((\S+)\);",
        "vmm_fast": r"low, high = math\.log\(\S+\), math\.log\((\S+)\)",
    },
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_the_same_in_every_language(name):
    found = {}
    for folder, pattern in CONSTANTS[name].items():
        files = [x for x in (ROOT / folder).rglob("*") if x.suffix in (".py", ".cpp", ".h")]
        values = [float(x) for file in files for x in re.findall(pattern, file.read_text(), re.M)]
        assert values, f"{folder} has no {pattern}"
        found[folder] = set(values)
    assert len(set.union(*found.values())) == 1, found
