"""Judging what a config would run, against a list of what is known to be harmless. Nothing is run or imported.

A config is code: ``_target_`` names anything that Python can import and ``$`` is evaluated. Here every name in it is
traced to where the installed packages really define it, and compared with the list below. What is not on the list, or
cannot be traced, is not trusted. The list keeps out running programs and code, importing by name, the network, reading
pickles and writing files other than by MONAI's and medseg's own writers of images, tables and weights.
"""

from __future__ import annotations

import ast
import builtins
import configparser
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from medseg.bundles.configs import SEPARATOR, Config, get, walk
from medseg.bundles.expressions import (
    GIVEN,
    REFERENCES,
    absolute,
    dotted_names,
    imported_name,
    is_expression,
    own_names,
    parse_expression,
)
from medseg.bundles.targets import find_target, index_monai

#: Full names, where they are defined. Of packages that come as Python source the definition itself must be found.
DEFINED = [
    r"monai\.(transforms|losses|inferers|metrics|engines|optimizers|visualize)\.[\w.]+",
    r"monai\.networks\.(nets|blocks|layers|schedulers)\.(?!\w+\.(get_pretrained|\w*download))[\w.]+",
    r"monai\.networks\.utils\.(one_hot|copy_model_state|normal_init|icnr_init|pixelshuffle|freeze_layers)",
    r"monai\.handlers\.(?!mlflow|clearml|trt)\w+\.\w+",
    r"monai\.data\.dataloader\.DataLoader",
    r"monai\.data\.thread_buffer\.\w+",
    r"monai\.data\.dataset\.(Dataset|CacheDataset|SmartCacheDataset|ArrayDataset|ZipDataset|NPZDictItemDataset|CSVDataset|DatasetFunc)",
    r"monai\.data\.(grid_dataset|iterable_dataset|image_dataset|samplers|box_utils|meta_tensor|image_reader)\.\w+",
    r"monai\.data\.decathlon_datalist\.(load_decathlon_datalist|load_decathlon_properties)",
    r"monai\.data\.utils\.(list_data_collate|pad_list_data_collate|decollate_batch|partition_dataset\w*|no_collation)",
    r"monai\.apps\.(detection|deepedit|deepgrow|vista3d|nuclick|generation|reconstruction|pathology)\.[\w.]+",
    r"monai\.utils\.misc\.(set_determinism|first|ensure_tuple\w*|fall_back_tuple|is_scalar|list_to_dict)",
    r"monai\.utils\.enums\.\w+(\.\w+)?",
    r"medseg\.(metrics|calibration)\.(?!write_)\w+",
    r"medseg\.bundles\.running\.(readable_output|check_arguments)",
    r"medseg\.io\.(datalist|images|overlay|predictions)\.(?!write_)\w+",
    r"medseg\.training\.\w+\.(?!write_|save_)\w+",
    r"medseg\.tracking\.recorder\.MLflowRecorder",
    r"medseg\.(crf|detection)\.[\w.]+",
    r"medseg\.tasks\.\w+\.(?!simulate|demo|paper|import)\w+\.(?!write_|save_)\w+",
    r"segmentation_models_pytorch\.(decoders\.\w+\.\w+|losses\.\w+)\.[A-Z]\w*",
    r"pytorch_lightning\.callbacks\.[\w.]*[A-Z]\w*",
    r"lightning\.pytorch\.callbacks\.[\w.]*[A-Z]\w*",
    r"torchvision\.(models|ops)\.[\w.]+",
    r"torch\.nn\.(modules\.\w+\.)?[A-Z]\w*",
    r"torch\.nn\.(parallel\.distributed\.)?DistributedDataParallel|ignite\.metrics\.[\w.]+",
    r"torch\.nn\.functional\.[a-z]\w*",
    r"torch\.nn\.(init|utils)\.[a-z]\w*_",
    r"torch\.optim\.(\w+\.)?[A-Z]\w*",
    r"torch\.utils\.data\.(\w+\.)*[A-Z]\w*",
    r"pydicom\.misc\.is_dicom",
]

#: Full names of what has no Python source, or belongs to Python itself.
NAMED = [
    r"torch\.(device|dtype|Tensor|Size|bool|uint8|int8|int16|int32|int64|long|float|float16|float32|float64|half|double)",
    r"torch\.(bfloat16|channels_last|channels_last_3d|contiguous_format|preserve_format|inf|pi|nan)",
    r"torch\.(tensor|as_tensor|from_numpy|zeros|ones|full|arange|linspace|eye|stack|cat|where|sum|mean|abs|argmax|max|min)",
    r"torch\.(sigmoid|softmax|exp|log|sqrt|clamp|round|any|all|isnan|isfinite|manual_seed|no_grad|is_tensor|randn|rand)",
    r"torch\.cuda\.(is_available|device_count|current_device|is_bf16_supported)",
    r"torch\.cuda\.amp\.GradScaler|torch\.amp\.(GradScaler|autocast)|torch\.jit\.load|torch\.load",
    r"torch\.distributed\.(is_available|is_initialized|get_rank|get_world_size|init_process_group|destroy_process_group)",
    r"torch\.nn\.SyncBatchNorm\.convert_sync_batchnorm",
    r"monai\.networks\.layers\.(factories\.)?(Norm|Act|Conv|Pool|Dropout|Pad)(\.[A-Z0-9]+)?",
    r"torch\.backends\.\w+(\.\w+)?",
    r"numpy\.(u?int(8|16|32|64|p)?|float(16|32|64|_)?|bool_?|single|double|pi|inf|nan|newaxis|ndarray|dtype|iinfo|finfo)",
    r"numpy\.(array|asarray|zeros|ones|full|arange|linspace|eye|stack|concatenate|where|unique|sort|argsort|argmax|argmin)",
    r"numpy\.(sum|mean|std|var|abs|max|min|maximum|minimum|prod|cumsum|round|floor|ceil|sqrt|exp|log|clip|any|all|isnan)",
    r"numpy\.(isfinite|percentile|quantile|median|transpose|moveaxis|expand_dims|squeeze|flip|rot90|count_nonzero|nonzero)",
    r"numpy\.random\.(seed|RandomState|default_rng)",
    r"os\.path\.\w+|posixpath\.\w+|ntpath\.\w+|genericpath\.\w+",
    r"os\.(getpid|getcwd|sep|cpu_count|listdir|environ\.get|fspath)",
    r"glob\.(glob|iglob|escape)|fnmatch\.\w+|math\.\w+|re\.[A-Za-z]\w*|string\.\w+|itertools\.\w+|statistics\.\w+",
    r"functools\.(partial|reduce)|collections\.(OrderedDict|defaultdict|Counter)|copy\.(copy|deepcopy)",
    r"time\.(strftime|time|perf_counter)|datetime\.(datetime|date|timedelta)(\.(now|today|utcnow))?|random\.(seed|Random)",
    r"sys\.(stderr|stdout)(\.isatty)?|sys\.(platform|version_info|maxsize)|platform\.(system|machine|python_version)",
    r"importlib\.util\.find_spec|logging\.(getLogger|INFO|WARNING|ERROR|DEBUG)|warnings\.(filterwarnings|simplefilter)",
    r"builtins\.(abs|all|any|bool|dict|divmod|enumerate|filter|float|frozenset|int|isinstance|len|list|map|max|min|pow|print)",
    r"builtins\.(range|reversed|round|set|slice|sorted|str|sum|tuple|zip|True|False|None|repr|callable|issubclass|complex)",
    r"builtins\.(\w+Error|Exception|Ellipsis|NotImplemented)",
]

#: Modules that an import may name as a whole: importing them does nothing else. Their parts are judged where used.
MODULES = (
    r"(os|sys|glob|fnmatch|math|re|json|string|itertools|statistics|functools|collections|copy|time|datetime|random|pathlib"
    r"|platform|logging|warnings|typing|numpy|torch|monai|ignite|medseg|torchvision|pytorch_lightning|scipy|skimage)"
    r"(\.[a-z]\w*)*|os\.path|segmentation_models_pytorch"
)

#: Attributes and methods of values that nothing harmful hides behind, whatever the value is.
_WORDS = """
T add all any append argmax as_tensor astype bool capitalize ceil chunk clamp clone close contiguous copy count cpu
cuda data detach device difference dim dtype endswith epoch eval exp expand extend extra fill find flatten flip
float floor format get groups half index indices initialize int intersection is_cuda isalnum isalpha isatty
isdecimal isdigit isidentifier islower isnumeric isspace isupper items itemsize iteration join keys layers
load_state_dict log long lower lstrip match max max_epochs mean meta metrics min named_parameters ndim network
nonzero numel numpy optimizer output param_groups parameters partition permute pop pred prod ravel removeprefix
removesuffix repeat replace requires_grad reshape resolve rfind round rpartition rsplit rstrip run search seed shape
sigmoid size softmax sort split splitext sqrt squeeze stack startswith state state_dict stem stop stride strip sub
suffix sum swapcase tell tensor title to tolist top train transforms transpose type union unsqueeze update upper val
values view zero_grad zfill zip
"""
ATTRIBUTES = frozenset(_WORDS.split())

#: How MONAI's readers and writers are named; any other value of these arguments is imported by name.
READERS = re.compile(r"(itk|nibabel|numpy|pil|pydicom|nrrd|wsi)?(reader|writer)", re.IGNORECASE)

#: Arguments that make a library fetch weights.
FETCHING = {"pretrained", "use_pretrained", "encoder_weights", "weights_backbone", "pretrained_backbone", "download"}

_DEFINED = re.compile("|".join(f"(?:{p})" for p in DEFINED))
_NAMED = re.compile("|".join(f"(?:{p})" for p in NAMED))
_MODULES = re.compile(MODULES)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*)://", re.IGNORECASE)

__all__ = ["Use", "judge_config", "judge_logging"]


@dataclass(frozen=True)
class Use:
    """Something that a config would do.

    Attributes:
        file: the config.
        key: id of the value in it.
        kind: ``target``, ``expression``, ``import`` or ``value``.
        text: what is written there.
        reason: why it is not trusted; empty if it is.
    """

    file: str
    key: str
    kind: str
    text: str
    reason: str = ""


def judge_config(config: Config, file: str) -> list[Use]:
    """Every target, expression and import of a config with its verdict, and every other value that is not trusted.

    Args:
        config: content, its macros resolved.
        file: its name.
    """
    imported, uses, expressions = dict(GIVEN), [], []
    for key, value in walk(config):
        if isinstance(value, dict) and "_target_" in value:
            uses.append(Use(file, key, "target", str(value["_target_"]), _target_reason(value["_target_"])))
            uses += [
                Use(file, f"{key}::{k}", "value", f"{k}: {v}"[:200], why) for k, v, why in _arguments(value, config)
            ]
        elif is_expression(value):
            try:
                tree = parse_expression(absolute(value, key))
            except ValueError as error:
                uses.append(Use(file, key, "expression", value[:200], f"cannot be read: {error}"[:300]))
                continue
            if isinstance(tree, ast.Expression):
                expressions.append((key, value, tree))
            else:
                name, full = imported_name(tree)
                reason = _import_reason(tree, full)
                if imported.setdefault(name, full) != full:
                    reason = f"{name} already means {imported[name]}"
                uses.append(Use(file, key, "import", value[:200], reason))
        elif isinstance(value, str):
            reason = _text_reason(value, key.rpartition("::")[2])
            if reason:
                uses.append(Use(file, key, "value", value[:200], reason))
    for key, value, tree in expressions:
        reasons = dict.fromkeys(_expression_reasons(tree, imported))
        uses.append(Use(file, key, "expression", value[:300], "; ".join(reasons)[:300]))
    return uses


def judge_logging(text: str, file: str) -> list[Use]:
    """Python's logging evaluates parts of its config file: handlers with other arguments than the console's are code.

    Args:
        text: content of ``logging.conf``.
        file: its name.
    """
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error as error:
        return [Use(file, "", "value", "", f"cannot be read: {str(error).splitlines()[0]}")]
    uses = []
    for section in parser.sections():
        for key, value in parser.items(section):
            harmless = {
                "class": r"(logging\.)?(StreamHandler|NullHandler|Formatter)",
                "args": r"\(\s*(sys\.(stdout|stderr)\s*,?\s*)?\)",
                "kwargs": r"\{\s*\}",
            }.get(key)
            if harmless and not re.fullmatch(harmless, value):
                uses.append(Use(file, f"[{section}] {key}", "value", value[:200], "logging evaluates this as Python"))
    return uses


def reason_for(name: str) -> str:
    """Why a full dotted name is not trusted; empty if it is."""
    try:
        target = find_target(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed here, so {name} cannot be judged"
    except (OSError, ValueError, RecursionError):
        return f"{name} cannot be traced"
    # a name of this list may be defined anywhere in its own package: numpy.stack is numpy._core.shape_base.stack
    if _NAMED.fullmatch(name) and (target is None or target.name.split(".")[0] == name.split(".")[0]):
        return ""
    if target is None:
        return f"{name} does not exist in the installed packages"
    if target.found and _DEFINED.fullmatch(target.name) and "._" not in target.name:
        return ""
    real = f" (really {target.name})" if target.name != name else ""
    return f"{name}{real} is not on the list of harmless names"


def _target_reason(target: object) -> str:
    if not isinstance(target, str) or target[:1] in ("$", "@", "%"):
        return "the target is computed, so it cannot be judged"
    try:
        name = index_monai([target]).get(target, target) if target.isidentifier() else target
    except ModuleNotFoundError:
        name = target
    return reason_for(name) if _DOTTED.fullmatch(name) else f"MONAI has no {target[:100]}"


def _arguments(component: Config, config: Config) -> Iterator[tuple[str, object, str]]:
    """Arguments through which a trusted component would do untrusted things."""
    for name, value in component.items():
        is_reference = isinstance(value, str) and value[:1] == "@"
        literal = get(config, value[1:].replace("#", SEPARATOR).split(SEPARATOR)) if is_reference else value
        if name == "_mode_" and literal not in ("default", "callable"):
            yield name, value, "starts a debugger"
        elif name in ("weights_only", "allow_pickle") and literal is not (name == "weights_only"):
            yield name, value, "unpickles, and unpickling runs code"
        elif name in ("reader", "writer"):
            for each in literal if isinstance(literal, list) else [literal]:
                if isinstance(each, str) and not READERS.fullmatch(each):
                    yield name, each, f"the {name} is imported by its name, and this is none of MONAI's"
        elif name in FETCHING and literal not in (None, False, "") and not is_reference:
            yield name, value, "makes the library download weights"


def _import_reason(statement: ast.Import | ast.ImportFrom, full: str) -> str:
    if isinstance(statement, ast.ImportFrom) and statement.level:
        return "relative import"
    return "" if _MODULES.fullmatch(full) else reason_for(full)


def _expression_reasons(tree: ast.Expression, imported: dict[str, str]) -> Iterator[str]:
    own = own_names(tree)
    hidden = sorted(n for n in own if n in imported or hasattr(builtins, n))
    if hidden:  # the same word would mean two things in one expression
        yield f"gives another meaning to {', '.join(hidden)}"
    switches = {node.func for node in ast.walk(tree) if _is_switch(node, imported)}
    for node, text, is_own in dotted_names(tree):
        if node in switches:
            continue
        first, *attributes = text.split(".")
        if text[0] == "." or is_own or first == REFERENCES:
            yield from (f".{a} is not on the list of harmless attributes" for a in attributes if a not in ATTRIBUTES)
        else:
            yield from _name_reasons(first, attributes, imported)
    for node in ast.walk(tree):  # type: ignore[assignment]
        if isinstance(node, ast.Call):
            yield from _call_reasons(node, imported)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            reason = _text_reason(node.value, "", joined=_is_joined(tree, node))
            if reason:
                yield f"{node.value[:80]!r} {reason}"


def _is_switch(node: ast.AST, imported: dict[str, str]) -> TypeGuard[ast.Call]:
    """``setattr(torch.backends.cudnn, 'benchmark', True)``, which half of the zoo has and which changes no code."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"):
        return False
    if len(node.args) != 3 or node.keywords or not all(isinstance(a, ast.Constant) for a in node.args[1:]):
        return False
    first, _, rest = ast.unparse(node.args[0]).partition(".")
    return re.fullmatch(r"torch\.backends\.(cudnn|cuda\.matmul)", f"{imported.get(first, '')}.{rest}") is not None


def _name_reasons(first: str, attributes: list[str], imported: dict[str, str]) -> Iterator[str]:
    full = imported.get(first, f"builtins.{first}")
    reason = ""
    # what is trusted may be followed by harmless attributes of its value: torch.float32.itemsize
    for end in range(len(attributes), -1, -1):
        why = reason_for(".".join([full, *attributes[:end]]))
        if not why and all(a in ATTRIBUTES for a in attributes[end:]):
            return
        reason = reason or why
    yield reason or f"{'.'.join([full, *attributes])} is not on the list of harmless names"


def _call_reasons(node: ast.Call, imported: dict[str, str]) -> Iterator[str]:
    for keyword in node.keywords:
        literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg == "weights_only" and literal is not True:
            yield "weights_only is not True: unpickling runs code"
        elif keyword.arg in ("pickle_module", "allow_pickle") and literal is not False:
            yield f"{keyword.arg}: unpickling runs code"
        elif keyword.arg in FETCHING and literal not in (None, False):
            yield f"{keyword.arg} makes the library download weights"
        elif keyword.arg is None and ast.unparse(node.func).endswith("load"):
            yield "arguments of load are computed"


def _is_joined(tree: ast.AST, constant: ast.Constant) -> bool:
    """Whether a text only continues another: ``@bundle_root + '/models'`` or ``f'{x}/models'``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and node.right is constant:
            return True
        if isinstance(node, ast.JoinedStr) and constant in node.values[1:]:
            return True
    return False


def _text_reason(text: str, name: str, joined: bool = False) -> str:
    """Why a text is not trusted as a path or an address. Where the user's data lie may be anywhere."""
    for scheme in _ADDRESS.findall(text):
        if scheme.lower() != "sqlite":
            return "is an address outside of this machine"
    if re.search(r"(^|[\\/])\.\.([\\/]|$)", text):
        return "leads out of the bundle"
    if _DOTTED.fullmatch(text) and text.split(".")[0] in sys.stdlib_module_names and reason_for(text):
        return "names something that a component might import and call"
    looks_absolute = re.match(r"(/\w|~|[A-Za-z]:[\\/]|\\\\)", text) is not None
    if looks_absolute and not joined and "data" not in name:
        return "is a path outside of the bundle"
    return ""
