"""What all request models have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator


class ApiModel(BaseModel):
    """A part of a request as OpenAI's clients send it: types are strict, `null` means not given.

    Unknown fields are kept aside (`model_extra`), so that they can be counted, and otherwise ignored.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
"""Name of a function or a schema."""

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
