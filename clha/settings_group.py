"""What groups of settings are made of: fields with marks, strict reading, the part that belongs to a key."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
DType = Literal["float32", "bfloat16", "float16"]

# What a setting that names a place can begin with instead of being a path.
NOT_PATHS = ("hub:", "bundled:")


def execution(default: Any, **limits: Any) -> Any:
    """A field that must not change results and therefore stays out of the key."""
    return Field(default, json_schema_extra={"execution": True}, **limits)


def place(default: Any) -> Any:
    """A file or folder, or a list of them: a relative path is taken from where it was written; not in the key."""
    return Field(default, json_schema_extra={"execution": True, "place": True})


def marked(field: Any, mark: str) -> bool:
    """Whether a pydantic field carries the mark `execution` or `place`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


class Group(BaseModel):
    """A group of settings: unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1; whoever writes it where a number stands means something else."""
        truths = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, bool)]
        numbers = _types(cls.model_fields[info.field_name or ""].annotation) if truths else set()
        if numbers & {int, float} and bool not in numbers:
            raise ValueError("must be a whole number" if int in numbers else "must be a number")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_null_character(cls, value: Any) -> Any:
        """No file name and no text of a setting can hold one."""
        if any(isinstance(v, str) and "\0" in v for v in (value if isinstance(value, list) else [value])):
            raise ValueError("holds a null character")
        return value

    def key_settings(self, *without: str) -> dict[str, Any]:
        """The settings that belong to a key, as plain JSON values; `without` names fields to leave out."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if name in without or marked(field, "execution"):
                continue
            value = getattr(self, name)
            if isinstance(value, Group):
                out[name] = value.key_settings()
            elif isinstance(value, list) and value and all(isinstance(v, Group) for v in value):
                out[name] = [v.key_settings() for v in value]
            else:
                out[name] = self.model_dump(mode="json", include={name})[name]
        return out


def _types(annotation: Any) -> set[type]:
    """The plain types that an annotation is made of: {int, NoneType} of `Positive | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation}
    return {t for inner in get_args(annotation) for t in _types(inner)}
