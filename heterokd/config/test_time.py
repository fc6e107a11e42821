"""The keys `data.test_time` and `promotion.test_time`: views of an image that an evaluation averages."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Strict, field_validator

from heterokd.config.settings import Settings


class TestTimeSettings(Settings):
    """Flip and multi-scale test of segmentation: class probabilities of all views are averaged."""

    __test__ = False  # no test class of pytest

    flip: bool = Field(False, description="also evaluate mirrored images")
    scales: Annotated[tuple[Annotated[float, Field(ge=0.1, le=4)], ...], Strict(False)] = Field(
        (1.0,), min_length=1, max_length=12, description="factors by which images are resized, such as [0.75, 1, 1.25]"
    )

    @field_validator("scales")
    @classmethod
    def _differ(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) < len(scales):
            raise ValueError(f"expected different factors, got {list(scales)}")
        return scales
