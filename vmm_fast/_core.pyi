# The compiled core; see csrc/bind_mixture.cpp and csrc/bind_stick_breaking.cpp.
from typing import Any

def __getattr__(name: str) -> Any: ...
