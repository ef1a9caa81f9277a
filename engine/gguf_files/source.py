"""A GGUF file, or its parts, as a model's folder: config, tokenizer and tensors out of it."""

import logging
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

from moestro.engine.facts import ModelRefused
from moestro.engine.quantized import Decoded

from .fields_file import write_fields
from .header import Header, read_header
from .names import plain_tensors
from .splits import gguf_paths
from .stored import Stored, check_entry, stored

log = logging.getLogger("moestro.engine")

SPLIT, PARTS, TENSORS = "split.no", "split.count", "split.tensors.count"
HEAD = "output.weight"
EXPERTS = "_exps."  # in the names of a layer's stacked experts
# Widths that the file states and transformers' older reader leaves at its classes' defaults: keys
# of the file behind its architecture, fields of the config.
WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
OLDER_FIELDS: Any = GGUF_CONFIG_MAPPING  # by architecture: keys of the file, fields of the config
NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
NEEDED_OF_EXPERTS = ("expert_count", "expert_used_count", "attention.layer_norm_rms_epsilon")
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True)
class GgufSource:
    """Its headers, in the order of the parts; the first has the model's fields."""

    headers: tuple[Header, ...]

    @classmethod
    def of(cls, path: Path) -> "GgufSource | None":
        """None where `path` names no GGUF. Raises ModelRefused, ModelNotFound or OSError.

        Among the refused: an architecture that transformers does not read.
        """
        paths = gguf_paths(path)
        if paths is None:
            return None
        found = cls(tuple(read_header(each) for each in paths))
        for header in found.headers:
            for entry in header.entries:
                check_entry(entry, header.path.stat().st_size)
        found._check_parts()
        found._refuse_unknown()
        found._check_fields()
        return found

    @property
    def paths(self) -> list[Path]:
        return [header.path for header in self.headers]

    @property
    def architecture(self) -> str:
        return self.headers[0].architecture

    @property
    def kinds(self) -> str:
        """The types of its tensors, the one with most of them first."""
        counts = Counter(entry.kind for header in self.headers for entry in header.entries)
        return ", ".join(GGMLQuantizationType(kind).name for kind, _ in counts.most_common())

    @property
    def stop_ids(self) -> list[int]:
        """Of tokens that end an answer, or a turn of a chat."""
        fields = self.headers[0].fields
        return [fields[key] for key in ENDS if type(fields.get(key)) is int]

    def config(self) -> PreTrainedConfig:
        """Raises whatever transformers raises over fields that are missing or wrong."""
        names = {entry.name for header in self.headers for entry in header.entries}
        with tempfile.TemporaryDirectory(prefix="moestro-gguf-") as folder:
            alone = Path(folder) / "model.gguf"
            if is_gguf_arch_supported(self.architecture):
                alone.symlink_to(self.paths[0].resolve())
            else:
                write_fields(self.headers[0], alone, [HEAD] if HEAD in names else ["none"])
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, gguf_file=alone.name, local_files_only=True, trust_remote_code=False
            )
        config.tie_word_embeddings = HEAD not in names  # they may be in another part
        self._add_widths(config)
        config.name_or_path = ""
        return config

    def tokenizer(self) -> Any:
        """transformers' tokenizer, chat template included. Raises whatever it and tokenizers do."""
        architecture, described, settings = get_gguf_tokenizer(str(self.paths[0]))
        backend, others = convert_gguf_tokenizer(architecture, described)
        made: Any = TokenizersBackend
        return made(tokenizer_object=backend, **settings | others)

    def tensors(self, config: PreTrainedConfig) -> dict[str, tuple[Path, Decoded]]:
        """{name in the model: (file, tensor)}. Raises ModelRefused or OSError."""
        found: dict[str, Stored] = {}
        file_of: dict[str, Path] = {}
        for header in self.headers:
            for name, tensor in stored(header.entries, header.path).items():
                if name in found:
                    raise ModelRefused(
                        f"{header.path}: tensor {name} is also in {file_of[name].name}; the files"
                        " are not of one model"
                    )
                found[name], file_of[name] = tensor, header.path
        model = _meta_model(config)
        plain, spare = plain_tensors(self.architecture, config, model, found)
        self._settle_spare(spare)
        log.info("weights: GGUF (%s), decoded to float32 where they lie in blocks", self.kinds)
        return {target: (file_of[next(iter(part.parts))], part) for target, part in plain.items()}

    def _refuse_unknown(self) -> None:
        known = carried_architectures()
        name = self.architecture
        if name in GGUF_CONFIG_ARCHS or name in TENSOR_PROCESSORS or name in OLDER_FIELDS:
            return
        raise ModelRefused(
            f"{self.paths[0]}: general.architecture is {name!r}, which transformers"
            f" {version('transformers')} does not read out of a GGUF file; with experts it reads"
            f" {', '.join(known)}; use the model's own folder with .safetensors"
        )

    def _check_fields(self) -> None:
        """Raises ModelRefused where transformers would take its class' defaults without a word."""
        first, name = self.headers[0], self.architecture
        with_experts = any(EXPERTS in entry.name for each in self.headers for entry in each.entries)
        for key in (*NEEDED, *(NEEDED_OF_EXPERTS if with_experts else ())):
            if f"{name}.{key}" not in first.fields:
                raise ModelRefused(
                    f"{first.path}: the field {name}.{key} is missing; the file is damaged or of an"
                    " old converter, make or fetch it again"
                )

    def _settle_spare(self, spare: set[str]) -> None:
        """Raises ModelRefused for experts that transformers' class has no place for."""
        lost = sorted(name for name in spare if EXPERTS in name)
        if lost:
            raise ModelRefused(
                f"{self.paths[0]}: general.architecture is {self.architecture!r}, of which"
                f" transformers {version('transformers')} does not read the experts ({lost[0]});"
                f" it does of {', '.join(carried_architectures())}; use the model's own folder"
                " with .safetensors"
            )
        if spare:
            log.info("not read: %s", ", ".join(sorted(spare)[:3]))

    def _add_widths(self, config: PreTrainedConfig) -> None:
        fields = self.headers[0].fields
        if is_gguf_arch_supported(self.architecture):
            return
        for key, name in WIDTHS.items():
            said = fields.get(f"{self.architecture}.{key}")
            if type(said) is int and said > 0 and hasattr(config, name):
                setattr(config, name, said)
        scaling = fields.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            log.warning(
                "%s: rope.scaling.type %s is not read; positions are as without it",
                self.paths[0],
                scaling,
            )

    def _check_parts(self) -> None:
        """Raises ModelRefused where the files are not the parts that they say they are."""
        count = len(self.headers)
        for place, header in enumerate(self.headers):
            said = header.whole(PARTS, 1) or 1, header.whole(SPLIT, place)
            if said[0] != count or said[1] != place:
                raise ModelRefused(
                    f"{header.path}: {PARTS} is {said[0]} and {SPLIT} {said[1]}, and its name says"
                    f" part {place + 1} of {count}; keep the names of the files as they were made"
                )
        here = sum(len(header.entries) for header in self.headers)
        wanted = self.headers[0].whole(TENSORS, here)
        if count > 1 and wanted != here:
            raise ModelRefused(
                f"{self.paths[0]}: {TENSORS} is {wanted}, and the {count} parts have {here}; they"
                " are not of one model, fetch them again"
            )


def carried_architectures() -> list[str]:
    """Those with experts that transformers reads, as files name them."""
    newer = [name for name in GGUF_CONFIG_ARCHS if name.endswith("moe")]
    older = [
        name
        for name in TENSOR_PROCESSORS
        if name in MODEL_ARCH_NAMES.values()
        and "expert_count" in OLDER_FIELDS.get(_config_name(name), ())
    ]
    return sorted({*newer, *older})


def _config_name(architecture: str) -> str:
    """As transformers' older reader calls it."""
    known: dict[str, str] = {name.replace("_", "").replace("-", ""): name for name in OLDER_FIELDS}
    return known.get(architecture.replace("_", "").replace("-", ""), architecture)


def _meta_model(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model
