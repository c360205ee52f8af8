"""The schema of an answer: what the caller asks for, what a server is told, and how an answer becomes values.

Knows no server and no frame. pydantic is imported when the first schema is made, since importing it takes long.
"""

from .fields import Field, Kind
from .schema import Schema

__all__ = ["Field", "Kind", "Schema"]
