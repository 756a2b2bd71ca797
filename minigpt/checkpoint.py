"""Models on disk: pretrained GPT-2 from the hub, and our own folders, fp16 and int4. Safetensors only, no pickle.

A checkpoint is a folder:

    config.json           the model's shape; for int4 also `quantization_config`, as GPTQ's tools write it
    model.safetensors     the tensors, under the names that Hugging Face's GPT-2 saves them by
    tokenizer.tiktoken    only if the model has a tokenizer of its own

Our fp16 checkpoints load in transformers as any GPT-2; our int4 ones have GPTQ's layout ("gptq_v2": zeros as they
are, not less one), but for the token embedding if that is packed, too (`minigpt.quantization.embedding`). OpenAI's
GPT-2 stores its linear weights as [in_features, out_features], the transpose of torch's nn.Linear; so do our files. A
missed transpose goes unnoticed where a layer is square, except in the logits.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt.config import PRESETS, GPTConfig
from minigpt.errors import UserError
from minigpt.model import GPT
from minigpt.quantization import embedding, gptq_format
from minigpt.quantization.linear import Int4Linear
from minigpt.tokenizer import FILE_NAME as TOKENIZER_FILE

DEMO_FOLDER = Path(__file__).parent / "demo"

# Hugging Face repositories of the pretrained models, each pinned to a commit.
HUB_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}

CONFIG_KEY = "config.json"  # in the header of the weights we save: the config.json that belongs to them
INDEX_FILE = "model.safetensors.index.json"  # of a checkpoint whose tensors come in several files
PRETRAINED = (*HUB_REVISIONS, "demo")  # the models that are known by name

# Linear weights, [in_features, out_features] in a file and [out_features, in_features] in the model.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PACKED = (".qweight", ".scales", ".qzeros", ".codes8")  # tensors of packed layers, kept as they are
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry along


def resolve(model: str) -> Path:
    """Where a model's files are: downloads a pretrained one (once), finds the demo, checks a path.

    Args:
        model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, or the path of a checkpoint folder or .safetensors file.

    Returns:
        A checkpoint folder, or the path of a .safetensors file.

    Raises:
        UserError: unknown model, or the hub cannot be reached.
    """
    check_known(model)
    if model == "demo":
        return DEMO_FOLDER
    return _download(model) if model in HUB_REVISIONS else Path(model)


def check_known(model: str) -> None:
    """Raises UserError unless `model` is the name of a pretrained one or a path that exists."""
    if model not in PRETRAINED and not (model and Path(model).exists()):
        raise UserError(f"unknown model {model!r}: neither one of {', '.join(PRETRAINED)} nor a path that exists")


def _download(model: str) -> Path:
    """Fetches a pretrained model through huggingface_hub, which caches, resumes and shows its progress."""
    from huggingface_hub import hf_hub_download

    from minigpt import hub  # with the library that it imports, only needed here

    repository, revision = f"openai-community/{model}", HUB_REVISIONS[model]
    try:
        for name in ("config.json", "model.safetensors"):
            hub.check_reachable(repository, name, revision)
            path = hf_hub_download(repository, name, revision=revision)
    except Exception as error:  # the library raises many kinds; each means that there is no file
        raise UserError(
            f"cannot fetch {repository} from the hub ({hub.reason(error)}). Without a network: "
            "`python quantize.py demo` and `python eval.py demo`, or give the path of a checkpoint folder"
        ) from error
    return Path(path).parent


def default_int4_folder(model: str) -> Path:
    """Where quantize.py writes, and eval.py looks, unless told otherwise: checkpoints/MODEL-int4."""
    path = Path(model).resolve()
    name = model if model in PRETRAINED else path.stem if path.is_file() else path.name
    return Path("checkpoints") / f"{name}-int4"


def checkpoint_folder(path: Path) -> Path:
    """The folder that holds a checkpoint's config and tokenizer, given the folder itself or its .safetensors file."""
    return path if path.is_dir() else path.parent


def load(path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> GPT:
    """Loads a checkpoint, fp or int4, in evaluation mode.

    Args:
        path: as `resolve` gives it.
        dtype: of everything that is not packed int4.
        device: where the model goes.

    Raises:
        UserError: a file is missing, truncated or not a GPT-2 checkpoint, or a tensor has the wrong shape or dtype,
            or values that `dtype` cannot hold.
    """
    tensors = _read_tensors(path)
    fields = _read_config(path, tensors)
    config = GPTConfig.from_dict(fields)
    if f"h.{config.n_layer - 1}.ln_1.weight" not in tensors:
        raise UserError(f"{path}: n_layer is {config.n_layer} in config.json, but the file has fewer blocks")
    with torch.device("meta"):  # shapes only: the file's own tensors take the parameters' places
        model = GPT(config)
    if fields.get("quantization_config") is not None:
        try:
            gptq_format.install_empty_layers(model, tensors, fields["quantization_config"])
            embedding.install_empty_embedding(model, tensors, fields["quantization_config"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    state = {}
    for name, wanted in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied to wte
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing; is this a GPT-2 checkpoint?")
        tensor = tensors.pop(name)
        if name.endswith(TRANSPOSED) and tensor.ndim == 2:
            tensor = tensor.t()
        if tensor.shape != wanted.shape:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, not {list(wanted.shape)}")
        packed = name.endswith(PACKED)
        if tensor.dtype != wanted.dtype if packed else not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, not {wanted.dtype}")
        state[name] = (tensor if packed else tensor.to(dtype)).contiguous()
        _check_finite(f"{path}: {name}", tensor, state[name])
    if "wte.weight" in state:
        tied = tensors.pop("lm_head.weight", None)
        if tied is not None and not torch.equal(tied.to(dtype), state["wte.weight"]):
            raise UserError(f"{path}: lm_head.weight differs from wte.weight; only tied output layers are supported")
    if tensors:
        raise UserError(f"{path}: {sorted(tensors)[0]} is no tensor of a GPT-2 with {config.n_layer} blocks")
    model.load_state_dict(state, strict=False, assign=True)
    if "wte.weight" in state:
        model.lm_head.weight = model.wte.weight
    return model.to(device, dtype).eval().requires_grad_(False)


def _check_finite(name: str, before: Tensor, after: Tensor) -> None:
    """Raises UserError if `after`, which is `before` in another dtype, has values that are not finite."""
    if not torch.isfinite(after).all():
        problem = f"too large for {after.dtype}" if torch.isfinite(before).all() else "NaN or infinite"
        raise UserError(f"{name} has values that are {problem}")


def _read_config(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of config.json; without one, those of the preset whose shapes the tensors have."""
    file = checkpoint_folder(path) / "config.json"
    if file.exists():
        try:
            fields = json.loads(file.read_bytes())
            saved = json.loads(_metadata(path).get(CONFIG_KEY, "{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise UserError(f"{file}: not a JSON object")
        if saved and saved != fields:
            raise UserError(
                f"{file} is not the one that the weights were saved with: two programs saved here at once, one was "
                "interrupted, or the file was changed; make the checkpoint anew"
            )
        return fields
    for preset in PRESETS.values():
        embedding = tensors.get("wte.weight")
        if embedding is not None and embedding.shape == (preset.vocab_size, preset.n_embd):
            return preset.to_dict()
    raise UserError(f"{file}: no such file, and the tensors are no published GPT-2's; the head count stands only there")


def weight_files(path: Path) -> list[Path]:
    """The .safetensors files of a checkpoint: one, or several where an index says so.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return [path]
    index = path / INDEX_FILE
    if index.exists():
        try:
            names = {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{index}: not an index of safetensors files") from error
        if not names:
            raise UserError(f"{index}: not an index of safetensors files: it names none")
        return [path / name for name in sorted(names)]
    if not (path / "model.safetensors").exists():
        raise UserError(f"{path}: no model.safetensors in this folder")
    return [path / "model.safetensors"]


def file_bytes(path: Path) -> int:
    """Size of a checkpoint's tensors on disk, everything in: codes, scales, zeros, embeddings."""
    return sum(file.stat().st_size for file in weight_files(path))


def is_int4(path: Path) -> bool:
    """Whether a checkpoint's config.json says so. One that cannot be read says nothing; `load` will complain of it."""
    try:
        fields = json.loads((checkpoint_folder(path) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("quantization_config") is not None


def check_int4(path: Path) -> None:
    """Raises UserError unless what --quantized names, which exists, is an int4 checkpoint."""
    if not is_int4(path):
        raise UserError(f"--quantized {path} is no int4 checkpoint; quantize.py makes one")


def made_how(path: Path) -> str:
    """How an int4 checkpoint that can be loaded was made: 'gptq, groups of 64, embedding int8'."""
    return gptq_format.made_how(_read_config(path, {})["quantization_config"])


def holds_another_model(folder: Path, model: GPT) -> bool:
    """Whether a folder has a checkpoint with other position embeddings than `model`, in fp16: int4 keeps them so.

    A folder without a whole checkpoint holds no model.
    """
    try:
        wpe = _read_tensors(folder, only="wpe.weight").get("wpe.weight", torch.empty(0))
    except UserError:
        return False
    return not torch.equal(wpe.to(torch.float16), model.wpe.weight.to("cpu", torch.float16))


def _metadata(path: Path) -> dict[str, str]:
    """What the header of a checkpoint's first .safetensors file says beside the tensors."""
    with safe_open(weight_files(path)[0], framework="pt") as opened:
        return opened.metadata() or {}


def _read_tensors(path: Path, only: str | None = None) -> dict[str, Tensor]:
    """All tensors, or one, by the names that our model uses: no `transformer.` prefix, no mask buffers."""
    tensors: dict[str, Tensor] = {}
    names = set()
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name.endswith(MASK_BUFFERS):
                        continue
                    ours = name.removeprefix("transformer.")
                    if ours in names:
                        raise UserError(f"{file}: tensor {ours} is there twice, maybe with and without `transformer.`")
                    names.add(ours)
                    if only in (None, ours):
                        tensors[ours] = opened.get_tensor(name)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error})") from error
    return tensors


def save(
    model: GPT, folder: Path, tokenizer_file: Path | None = None, quantization: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint folder; a checkpoint that is there already is replaced.

    What fails while writing leaves the old files. Then the new ones take their places one after another, so an
    interruption there, or two programs saving at once, may mix two checkpoints: `load` refuses weights beside a
    config.json that is not theirs. (A tokenizer is not compared.)

    Args:
        model: fp or int4. Everything that is not packed is written as fp16.
        folder: where to.
        tokenizer_file: copied beside the weights; a model without one is taken to use GPT-2's tokens.
        quantization: of an int4 model, its `gptq_format.describe`.

    Raises:
        UserError: a tensor has values that fp16 cannot hold, or the disk fails.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        stored = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        _check_finite(name, tensor, stored)
        tensors[f"transformer.{name}"] = stored.cpu().contiguous()
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            tensors[f"transformer.{name}.g_idx"] = gptq_format.group_index(module)
    tensors.setdefault(f"transformer.{embedding.STOP_SIGN}", torch.empty((0, model.config.n_embd), dtype=torch.float16))
    fields = model.config.to_dict() | {"dtype": "float16"}
    if quantization:
        fields["quantization_config"] = quantization
    config = json.dumps(fields, indent=1) + "\n"
    with replace_files(folder) as temporary:
        (temporary / "config.json").write_text(config, encoding="utf-8")
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt", CONFIG_KEY: config})
        except SafetensorError as error:  # the library's way to say that the disk is full
            raise UserError(f"cannot write to {folder}: {error}") from error
        if tokenizer_file:
            shutil.copyfile(tokenizer_file, temporary / TOKENIZER_FILE)


@contextlib.contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write in; its files move into `folder` once the block ends without an error.

    So a full disk or Ctrl-C while writing leaves what was in `folder` before. The moves themselves are not one step.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))  # inside: moving must not cross file systems
    try:
        yield temporary
        written = sorted(temporary.iterdir())
        for file in written:
            file.chmod(0o644)
            file.replace(folder / file.name)
        for name in {TOKENIZER_FILE, INDEX_FILE} - {file.name for file in written}:
            (folder / name).unlink(missing_ok=True)  # an earlier checkpoint's
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def check_output(folder: Path) -> None:
    """Raises UserError if a checkpoint cannot be written to `folder`, before any work is done for it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output {folder}: {existing} is a file; a checkpoint is a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: no permission to write to {existing}")
