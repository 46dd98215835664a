"""What is known to be harmless in a bundle's configs: the list that :mod:`medseg.bundles.trust` judges by.

Everything is spelt out on purpose. Before adding a name ask: does it import or call by a name that it is given as text,
run programs, reach the network, unpickle, or write a text file of any name? A method of a value is judged by its name
alone, so it has to be harmless on every object.
"""

from __future__ import annotations

import re

#: Classes (and a few functions) of packages that come as Python source, by the name of their definition, which must be
#: found there. Left out, though they look like their neighbours: what imports or calls by a name given as text, fetches
#: from the network by default, unpickles, or writes a text file of any name (``x.py`` in the bundle would be imported).
DEFINED = [
    r"monai\.transforms\.(croppad|intensity|post|smooth_field|spatial|utility|regularization|meta_utility|signal|io)"
    r"\.\w+\.(?!\w*(TorchVision|TorchIO|CuCIM))[A-Z]\w*",
    r"monai\.transforms\.compose\.[A-Z]\w*",
    r"monai\.(losses|metrics|inferers|optimizers|visualize|engines)\.\w+\.(?!Perceptual|FID|MMD)[A-Z]\w*",
    r"monai\.engines\.utils\.(default_prepare_batch|default_make_latent|default_metric_cmp_fn)",
    r"monai\.optimizers\.utils\.generate_param_groups",
    r"monai\.networks\.(nets|blocks|layers|schedulers)\.(?!transchex)\w+\.(?!FlexUNetEncoderRegister|TextEncoder)[A-Z]\w*",
    r"monai\.networks\.nets\.(resnet\.resnet\d+|densenet\.densenet\d+|senet\.se\w+)",
    r"monai\.networks\.utils\.(one_hot|copy_model_state|normal_init|icnr_init|pixelshuffle|freeze_layers)",
    r"monai\.handlers\.(?!mlflow|clearml|trt|logfile|classification|metrics_saver|probability)\w+\.[A-Z]\w*",
    r"monai\.handlers\.(utils\.from_engine|earlystop_handler\.stopping_fn\w*|utils\.stopping_fn\w*)",
    r"monai\.data\.dataloader\.DataLoader|monai\.data\.thread_buffer\.Thread(Buffer|DataLoader)",
    r"monai\.data\.dataset\.(Dataset|CacheDataset|SmartCacheDataset|ArrayDataset|ZipDataset)",
    r"monai\.data\.grid_dataset\.(GridPatchDataset|PatchDataset|PatchIter|PatchIterd)",
    r"monai\.data\.(iterable_dataset\.(IterableDataset|ShuffleBuffer)|samplers\.[A-Z]\w*|meta_tensor\.MetaTensor)",
    r"monai\.data\.(image_dataset\.ImageDataset|box_utils\.[a-zA-Z]\w*)",
    r"monai\.data\.image_reader\.(ITKReader|NibabelReader|PILReader|PydicomReader|NrrdReader)",
    r"monai\.data\.image_writer\.(ITKWriter|NibabelWriter|PILWriter)",
    r"monai\.data\.decathlon_datalist\.(load_decathlon_datalist|load_decathlon_properties)",
    r"monai\.data\.utils\.(list_data_collate|pad_list_data_collate|decollate_batch|partition_dataset\w*|no_collation)",
    r"monai\.apps\.detection\.(networks|utils|transforms|metrics)\.\w+\.[A-Z]\w*",
    r"monai\.apps\.detection\.networks\.retinanet_network\.resnet_fpn_feature_extractor",
    r"monai\.apps\.(deepedit|deepgrow|vista3d|nuclick|pathology)\.transforms\.([a-z]\w*\.)*[A-Z]\w*",
    r"monai\.apps\.(vista3d|pathology)\.(inferer|inferers|losses)\.(\w+\.)?[A-Z]\w*",
    r"monai\.utils\.misc\.(set_determinism|first|ensure_tuple|ensure_tuple_rep|ensure_tuple_size|fall_back_tuple)",
    r"monai\.utils\.enums\.[A-Z]\w*(\.[A-Z]\w*)?",
    r"medseg\.metrics\.[a-z]\w*",
    r"medseg\.bundles\.running\.(readable_output|check_arguments)",
    r"medseg\.io\.datalist\.(load_datalist|split|scored_items|check_binary_masks)",
    r"medseg\.io\.predictions\.(PredictionReport|check_inputs)|medseg\.io\.mrc_monai\.MRC(Reader|Writer)",
    r"medseg\.training\.\w+\.[A-Z]\w*|medseg\.training\.(transfer\.prepare|checkpoint\.load_weights|precision\.fast_precision)",
    r"medseg\.tracking\.recorder\.MLflowRecorder",
    r"medseg\.(crf|detection)\.(\w+\.)?[A-Z]\w*",
    r"medseg\.tasks\.[a-z]\w*\.(?!simulate|demo|paper|fit_crf|import_)[a-z]\w*\.[A-Z]\w*",
    r"segmentation_models_pytorch\.(decoders\.\w+\.\w+|losses\.\w+)\.[A-Z]\w*",
    r"(pytorch_lightning|lightning\.pytorch)\.callbacks\.\w+(\.\w+)?\.[A-Z]\w*",
    r"torchvision\.models\.(detection\.|segmentation\.|video\.)?\w+\.[a-z]\w*|torchvision\.ops\.\w+\.[a-zA-Z]\w*",
    r"torch\.nn\.(modules\.\w+\.)?(?!ParameterDict\b)[A-Z]\w*|torch\.nn\.functional\.[a-z]\w*|torch\.nn\.init\.[a-z]\w*_",
    r"torch\.nn\.utils\.clip_grad\.clip_grad_(norm|value)_|torch\.nn\.parallel\.distributed\.DistributedDataParallel",
    r"torch\.optim\.(\w+\.)?[A-Z]\w*",
    r"torch\.utils\.data\.(\w+\.)?(DataLoader|Dataset|TensorDataset|Subset|ConcatDataset|RandomSampler|BatchSampler"
    r"|SequentialSampler|WeightedRandomSampler|SubsetRandomSampler|DistributedSampler)",
    r"ignite\.metrics\.(\w+\.)?(Accuracy|Precision|Recall|Loss|MeanSquaredError|MeanAbsoluteError|ROC_AUC"
    r"|ConfusionMatrix|RunningAverage|Average)",
    r"pydicom\.misc\.is_dicom",
]

#: Full names of what has no Python source, or belongs to Python itself. Spelt out: a module's other names are modules.
NAMED = [
    r"torch\.(device|dtype|Tensor|Size|bool|uint8|int8|int16|int32|int64|long|float|float16|float32|float64|half|double)",
    r"torch\.(bfloat16|channels_last|channels_last_3d|contiguous_format|preserve_format|inf|pi|nan)",
    r"torch\.(tensor|as_tensor|from_numpy|zeros|ones|full|arange|linspace|eye|stack|cat|where|sum|mean|abs|argmax|max|min)",
    r"torch\.(sigmoid|softmax|exp|log|sqrt|clamp|round|any|all|isnan|isfinite|manual_seed|no_grad|is_tensor|randn|rand)",
    r"torch\.cuda\.(is_available|device_count|current_device|is_bf16_supported|amp\.GradScaler)",
    r"torch\.amp\.(GradScaler|autocast)|torch\.jit\.load|torch\.load|torch\.nn\.SyncBatchNorm\.convert_sync_batchnorm",
    r"torch\.distributed\.(is_available|is_initialized|get_rank|get_world_size|init_process_group|destroy_process_group)",
    r"torch\.backends\.cudnn\.(benchmark|deterministic|enabled|allow_tf32)",
    r"monai\.networks\.layers\.(factories\.)?(Norm|Act|Conv|Pool|Dropout|Pad)(\.[A-Z0-9]+)?",
    r"numpy\.(u?int(8|16|32|64|p)?|float(16|32|64)|bool_?|single|double|pi|inf|nan|newaxis|ndarray|dtype|iinfo|finfo)",
    r"numpy\.(array|asarray|zeros|ones|full|arange|linspace|eye|stack|concatenate|where|unique|sort|argsort|argmax|argmin)",
    r"numpy\.(sum|mean|std|var|abs|max|min|maximum|minimum|prod|cumsum|round|floor|ceil|sqrt|exp|log|clip|any|all|isnan)",
    r"numpy\.(isfinite|percentile|quantile|median|transpose|moveaxis|expand_dims|squeeze|flip|rot90|count_nonzero|nonzero)",
    r"numpy\.random\.(seed|RandomState|default_rng)",
    r"os\.path\.(join|basename|dirname|splitext|split|exists|isfile|isdir|abspath|normpath|relpath|realpath|expanduser|sep)",
    r"os\.(getpid|getcwd|sep|cpu_count|listdir|environ\.get|fspath)",
    r"glob\.(glob|iglob|escape)|fnmatch\.(fnmatch|fnmatchcase|filter)|math\.[a-z]\w*|itertools\.[a-z]\w*",
    r"re\.(compile|match|search|sub|split|findall|fullmatch|finditer|escape|I|M|S|IGNORECASE|MULTILINE|DOTALL)",
    r"string\.(ascii_letters|ascii_lowercase|ascii_uppercase|digits)|statistics\.(mean|median|stdev|variance|mode)",
    r"functools\.(partial|reduce)|collections\.(OrderedDict|defaultdict|Counter)",
    r"time\.(strftime|time|perf_counter)|datetime\.(datetime|date|timedelta)|datetime\.datetime\.(now|today|utcnow)",
    r"random\.(seed|Random)|sys\.(stderr|stdout)\.isatty|sys\.(stderr|stdout|platform|version_info|maxsize)",
    r"platform\.(system|machine|python_version)|importlib\.util\.find_spec",
    r"logging\.(getLogger|INFO|WARNING|ERROR|DEBUG)|warnings\.(filterwarnings|simplefilter)",
    r"builtins\.(abs|all|any|bool|dict|divmod|enumerate|filter|float|frozenset|int|isinstance|len|list|map|max|min|pow|print)",
    r"builtins\.(range|reversed|round|set|slice|sorted|str|sum|tuple|zip|True|False|None|repr|callable|issubclass|complex)",
    r"builtins\.([A-Z]\w*Error|Exception|Ellipsis|NotImplemented)",
]

#: Trusted as a component whose arguments are all seen: not inside an expression, and not prepared for a later call
#: (``_mode_: callable``) with further arguments. They import by a name given as text, connect, unpickle if asked to, or
#: fetch weights unless they are told not to. Networks with an argument of ``FETCHING`` count as well.
COMPONENTS_ONLY = re.compile(
    r"monai\.transforms\.io\..*|monai\.data\.image_dataset\..*|monai\.inferers\.inferer\.PatchInferer"
    r"|torch\.jit\.\w*\.?load|torch\.serialization\.load|torch\.distributed\..*|torchvision\.models\..*"
    r"|segmentation_models_pytorch\.decoders\..*|monai\.networks\.(nets\.(torchvision_fc|milmodel)|blocks\.fcn)\..*"
)

#: Of those and the rest, what may stand in an expression if it is called there, where its arguments are seen too.
CALLED_ONLY = {"torch.load", "torch.distributed.init_process_group", "importlib.util.find_spec"}

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

#: How MONAI's readers and writers are named; any other text is imported by its name. NumPy's reader unpickles.
READERS = re.compile(
    r"(itk|nibabel|pil|pydicom|nrrd)(reader|writer)|medseg\.io\.mrc_monai\.MRC(Reader|Writer)", re.IGNORECASE
)
READER_CLASSES = re.compile(
    r"(monai\.data\.(image_reader|image_writer)\.)?(ITK|Nibabel|PIL|Pydicom|Nrrd)(Reader|Writer)"
    r"|medseg\.io\.mrc_monai\.MRC(Reader|Writer)"
)

#: Arguments that make a library fetch weights if they are not false; of these libraries they must be given.
FETCHING = {
    "pretrained", "use_pretrained", "encoder_weights", "weights_backbone", "pretrained_backbone", "download",
    "pretrained_url", "download_url", "adapter_weights",
}  # fmt: skip
FETCHED_BY_DEFAULT = {
    r"segmentation_models_pytorch\.decoders\..*": "encoder_weights",
    r"monai\.networks\.nets\.(efficientnet|milmodel)\..*": "pretrained",
    r"monai\.networks\.blocks\.fcn\..*": "pretrained",
    r"torchvision\.models\.(detection|segmentation)\..*": "weights_backbone",
}

#: Arguments that have to have one of these values, and what happens otherwise.
SPECIAL: dict[str, tuple[tuple[object, ...], str]] = {
    "reader": ((), ""),
    "writer": ((), ""),
    "_mode_": (("default", "callable"), "starts a debugger, which reads commands from a file"),
    "_debug_": ((False, None), "starts a debugger, which reads commands from a file"),
    "merger_cls": ((None, "AvgMerger"), "is imported by its name"),
    "weights_only": ((True,), "unpickles, and unpickling runs code"),
    "allow_pickle": ((False,), "unpickles, and unpickling runs code"),
    "pickle_module": ((), "unpickles, and unpickling runs code"),
}
