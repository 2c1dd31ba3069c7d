"""Options of the description that saved files carry."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """Texts for the modelspec.* metadata of saved files."""

    metadata_title: str | None = option(None, "Title; unset: --output_name.")
    metadata_author: str | None = option(None, "Author.")
    metadata_description: str | None = option(None, "Description.")
    metadata_license: str | None = option(None, "Licence.")
    metadata_tags: str | None = option(None, "Tags, separated by commas.")
    metadata_usage_hint: str | None = option(None, "How to use the file.")
    metadata_thumbnail: str | None = option(None, "Small picture: an image file, or a data: URL.", is_path=True)
    metadata_merged_from: str | None = option(None, "Names of the models that the base model was merged from.")
    metadata_trigger_phrase: str | None = option(None, "Words that call up what was learnt.")
    metadata_preprocessor: str | None = option(None, "Preprocessor that the file needs.")
    metadata_is_negative_embedding: str | None = option(None, "Whether it is a negative embedding: true or false.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
