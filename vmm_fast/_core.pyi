# The compiled core; see csrc/bind_*.cpp.
from typing import Any

def __getattr__(name: str) -> Any: ...
