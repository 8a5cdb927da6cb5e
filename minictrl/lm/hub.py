"""The hub's names -> local copies or the hub, with errors of one line.

A local copy is a folder of the hub's name in the hub's layout, under the working directory or
$MINICTRL_HUB: what the hub calls Anthropic/hh-rlhf is read from ./Anthropic/hh-rlhf, if that is
there. It serves models and data sets alike.
"""

import importlib.util
import io
import json
import os
import re
import socket
import sys
import urllib.request
import warnings
from contextlib import nullcontext, redirect_stderr
from copy import deepcopy
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

from safetensors import SafetensorError, safe_open

from minictrl.messages import first_line

ADAPTER, ADAPTED = "adapter_config.json", "adapter_model.safetensors"  # peft's
KERNEL = r'(attn|experts)_implementation\w*": [^,}]*/'  # in a config.json: of the hub
WEIGHTS = "model.safetensors"
# Bounds on the numbers in a config.json. A size is at most the bytes of the weights; a count at
# most a LEAST-th of them, because each thing that is counted takes as many bytes or more. Where
# there are no weights, MOST stands for their bytes.
SIZES = ("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim")
SIZES += ("num_attention_heads", "n_head", "num_key_value_heads", "type_vocab_size", "d_model")
SIZES += ("dim", "hidden_dim", "d_ff", "n_heads", "num_heads", "embedding_size")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels", "num_experts")
LEAST, MOST = 16, 1_000_000
LABELS = r"\.(score|classifier)(\.out_proj)?\.weight$"  # of a head: a row each
HEADS = ("score", "classifier", "v_head", "qa_outputs")  # what a language model has no place for


def local_copy(name: str) -> Path:
    """Where a local copy of what the hub calls `name` would be."""
    return Path(os.environ.get("MINICTRL_HUB", ".")) / name


def hub_name(name: str) -> str:
    """A local copy of what the hub calls `name`, if there is one, else the name.

    A hub that no one can reach is asked nothing: its client would try for half a minute before it
    looks into its cache.
    """
    local = local_copy(name)
    if local.exists():
        return str(local)
    from huggingface_hub import constants

    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    return name


def unreachable(kind: str, name: str, error: Exception) -> str:
    """One line on why a hub's name or a directory gave nothing, and what to do."""
    why = first_line(error)
    if Path(name).is_file():
        return f"{kind} {name}: can't be read ({why}); it is damaged, or not what its name says"
    if Path(name).exists():
        return f"{kind} {name}: can't be read ({why}); give a directory in the hub's layout"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        return (
            f"{kind} {name}: there is no such file or directory in {Path.cwd()}; give a hub name "
            "or a path that exists"
        )
    return (
        f"{kind} {name}: not in the hub's cache here, and the hub can't be reached or has none of "
        f"that name ({why}); put its files into ./{name}, or into $MINICTRL_HUB/{name}, or give a "
        "directory"
    )


def from_hub(loader, kind: str, name: str, *, new_head: bool = False, **options):
    """loader.from_pretrained, where whatever can be wrong is a ValueError of one line, missing
    weights included.

    new_head: the model gets a head that its weights don't have, and has no use for their own.
    """
    if name.endswith(".gguf"):
        return from_gguf(loader, kind, name, new_head=new_head, **options)
    name = hub_name(name)
    here, tokenizer = Path(name), loader.__name__ == "AutoTokenizer"
    own = ("config.json", "tokenizer_config.json")[: 1 + tokenizer]
    if (here / ADAPTER).is_file() and not any((here / file).is_file() for file in own):
        return from_adapter(loader, kind, name, **options)
    if new_head:
        options["ignore_mismatched_sizes"] = True
    loaded = from_pretrained(loader, kind, name, **options)
    if tokenizer and not loaded("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{kind} {name}: there are no tokenizer files; put its tokenizer.json beside the "
            "weights"
        )
    if not has_weights(loader):
        return loaded
    if getattr(loaded[0], "_hf_peft_config_loaded", False):
        raise ValueError(adapter_refused(kind, name))
    for config in (loaded[0].config, loaded[0].config.get_text_config()):
        config.return_dict = True  # what a model gives is read by name
    if new_head:
        check_body(f"{kind} {name}", *loaded)
    else:
        check_weights(f"{kind} {name}", loader.__name__.removeprefix("AutoModelFor"), loaded[1])
    return loaded[0]


def has_weights(loader) -> bool:
    """Whether a loader is of models, not of tokenizers or configs."""
    return loader.__name__.startswith("AutoModelFor")


def from_pretrained(loader, kind: str, name: str, **options):
    """loader.from_pretrained, quiet, with errors of one line; a model's with its loading info."""
    if has_weights(loader):
        options["output_loading_info"] = True
    if "gguf_file" not in options:
        check_files(kind, Path(name), weights=has_weights(loader))
        if has_weights(loader):
            options["use_safetensors"] = True
    # a .gguf file's progress bar
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with quiet:
            loaded = loader.from_pretrained(name, trust_remote_code=False, **options)
            if loader.__name__ == "AutoTokenizer":
                loaded("a")  # what is wrong with it is said now
            return loaded
    except Exception as error:  # nothing of ours runs here, and `tokenizers` raises bare ones
        if "gguf_file" in options:
            raise ValueError(
                f"{kind} {name}/{options['gguf_file']}: can't be read ({first_line(error)}); a "
                ".gguf file needs pip install -e '.[gguf]'"
            ) from None
        raise ValueError(unreachable(kind, name, error)) from None


def check_files(kind: str, folder: Path, *, weights: bool):
    """Raises ValueError on a directory whose weights are a pickle or lie elsewhere, or whose
    config.json describes a model far larger than they are: that would take all memory, or for ever.

    weights: whether they are to be read.
    """
    config, index = folder / "config.json", folder / f"{WEIGHTS}.index.json"
    if not config.is_file():  # of the hub, or nothing, as transformers will say
        return
    files = [folder / WEIGHTS]
    if not files[0].is_file() and index.is_file():
        names = read_object(kind, index).get("weight_map")
        names = set(names.values() if isinstance(names, dict) else [None])
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(
                f"{kind} {folder}: {index.name} names files that are not in the directory; put "
                "them beside it"
            )
        files = [folder / name for name in names]
    settings = read_object(kind, config)
    if re.search(KERNEL, json.dumps(settings)):
        raise ValueError(
            f"{kind} {folder}: its config.json asks for code of the hub, which is not run; take "
            "its attn_implementation and experts_implementation out"
        )
    there = all(path.is_file() for path in files)
    if weights and not there:
        raise ValueError(
            f"{kind} {folder}: has no {WEIGHTS}, and nothing else is read, because a pickle could "
            "run code; save it again with model.save_pretrained"
        )
    size = sum(path.stat().st_size for path in files) if there else MOST
    most = dict.fromkeys(SIZES, size) | dict.fromkeys(COUNTS, size // LEAST)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    for part, name in product(parts, most):
        value = part.get(name)
        if isinstance(value, (int, float)) and not value <= most[name]:
            raise ValueError(
                f"{kind} {folder}: its config.json has {name} {value}, for weights of {size} "
                "bytes; put the config.json there that belongs to them"
            )


def read_object(kind: str, path: Path) -> dict:
    """An object in JSON. Raises ValueError if the file holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        value = first_line(error)
    if not isinstance(value, dict):
        raise ValueError(f"{kind} {path}: is no object in JSON ({str(value)[:60]}); put it back")
    return value


def from_gguf(loader, kind: str, name: str, **options):
    """Of DIR/FILE.gguf: a causal model, or its config or tokenizer."""
    folder, _, file = name.rpartition("/")
    folder = folder or "."
    if Path(folder).is_dir() and not Path(folder, file).is_file():
        raise ValueError(f"{kind} {name}: there is no such file; give DIR/FILE.gguf")
    loaded = from_hub(loader, kind, folder, gguf_file=file, **options)
    if loader.__name__ == "AutoConfig":
        loaded.architectures = ["ForCausalLM"]
    if has_weights(loader):  # plain tensors by now, but transformers would not save or train them
        loaded.hf_quantizer, loaded.is_quantized = None, False
        del loaded.config.quantization_config
    return loaded


def from_adapter(loader, kind: str, name: str, **options):
    """Of a directory of peft's: its base with the adapter merged into it, or the base's config or
    tokenizer. An adapter of a classifier has its head."""
    settings = read_object(kind, Path(name) / ADAPTER)
    base, head = settings.get("base_model_name_or_path"), settings.get("task_type") == "SEQ_CLS"
    if importlib.util.find_spec("peft") is None or not (base and isinstance(base, str)):
        raise ValueError(adapter_refused(kind, name))
    if not (Path(name) / ADAPTED).is_file():
        raise ValueError(
            f"{kind} {name}: has no {ADAPTED}, and nothing else is read, because a pickle could "
            "run code; save it again with model.save_pretrained"
        )
    if (Path(hub_name(base)) / ADAPTER).is_file():
        raise ValueError(f"{kind} {name}: its base {base} is an adapter too; merge that first")
    if not has_weights(loader):
        loaded = from_hub(loader, f"base of {kind}", base, **options)
        if head and loader.__name__ == "AutoConfig":
            loaded.architectures = ["ForSequenceClassification"]
        return loaded
    from peft import PeftModel

    if head:
        options |= {"new_head": True, "num_labels": labels_of(Path(name) / ADAPTED)}
    model = from_hub(loader, f"base of {kind}", base, **options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, name)
            untie(model)
            return adapted.merge_and_unload()
    except Exception as error:  # peft's, of whatever its files hold
        raise ValueError(
            f"{kind} {name}: is no adapter of its base {base} ({first_line(error)}); give one that "
            "was trained on it"
        ) from None


def labels_of(adapted: Path) -> int:
    """How many labels the head in an adapter's weights has; 1 where there is none to be read."""
    try:
        with safe_open(adapted, "pt") as file:
            heads = [key for key in file.keys() if re.search(LABELS, key)]
            return file.get_slice(heads[0]).get_shape()[0] if heads else 1
    except (SafetensorError, IndexError):  # peft will say
        return 1


def untie(model):
    """Gives a head that shares the embeddings' weights its own, where an adapter is on either: what
    is merged into one would change the other."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        return
    if hasattr(table, "base_layer") or hasattr(head, "base_layer"):  # peft's
        own = getattr(head, "base_layer", head)
        own.weight = deepcopy(own.weight)
        model.config.tie_word_embeddings = False


def check_weights(model: str, wanted: str, info: dict):
    """Raises ValueError on weights that are missing, or of a head that is not read; warns of others
    that are not read. info: transformers' loading info."""
    missing, unused = (sorted(info[key]) for key in ("missing_keys", "unexpected_keys"))
    if missing:
        raise ValueError(
            f"{model}: has no weights for {', '.join(missing[:3])}{' …' * (len(missing) > 3)}; "
            f"give a model saved as {wanted}"
        )
    heads = [key for key in unused if key.split(".")[0] in HEADS]
    if heads:
        raise ValueError(
            f"{model}: has weights for {', '.join(heads)}, which a {wanted} doesn't read; "
            'name its class in the "architectures" of its config.json (…ForSequenceClassification)'
        )
    if unused:
        warnings.warn(
            f"{model}: {len(unused)} of its weights are not read, {unused[0]} among them; "
            "does its config.json belong to them?",
            stacklevel=3,
        )


def check_body(model: str, loaded, info: dict):
    """Raises ValueError on weights of another size than the model's, but for those of its head."""
    body = f"{loaded.base_model_prefix}."
    other = sorted(key for key, *_ in info["mismatched_keys"] if key.startswith(body))
    if other:
        raise ValueError(
            f"{model}: its {other[0]} has another size than its config.json says; put the "
            "config.json there that belongs to the weights"
        )


def adapter_refused(kind: str, name: str) -> str:
    """Why an adapter is not read, and what to do."""
    return (
        f"{kind} {name}: is an adapter, not a model: pip install peft, and name its base in "
        f"{ADAPTER}; or merge the two and give that: "
        "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIR)"
    )
