"""FAVDBench's options, of its favd_32frm_default.json or of a run's args.json, as values of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.avlformer.config import PARTS
from models.config_values import Convert, converted, integer, number, put, switch, text, texts
from models.family import Imported, InputError

PRESET = "favd_32frm"
PHASE = "avlformer.finetune"
DEVICES, EPOCHS, WARMUP = 8, 150, 0.1  # of the published command, where a file lacks them
# Width, depths and heads of the published Video Swins that its flags reach.
SIZES = {"base": (128, [2, 2, 18, 2], [4, 8, 16, 32]), "large": (192, [2, 2, 18, 2], [6, 12, 24, 48])}
ABSENT = (None, "", "None")  # a path that is not given

# Option -> key below `avlformer.finetune`, and what the value must be.
PLAIN: dict[str, tuple[str, Convert]] = {
    "img_feature_dim": ("model.feature_dim", integer),
    "use_checkpoint": ("model.video.checkpointing", switch),
    "freeze_passt": ("model.audio.freeze", switch),
    "drop_out": ("model.text.dropout", number),
    "tie_weights": ("model.text.tie_weights", switch),
    "learning_rate": ("lr", number),
    "num_workers": ("num_workers", integer),
    "logging_steps": ("log_interval", integer),
    "mask_prob": ("mask_prob", number),
    "max_masked_tokens": ("max_masked", integer),
    "mask_tag_prob": ("parts_share", number),
    "lambda_": ("lm_weight", number),
    "loss_sparse_w": ("sparse_weight", number),
    "label_smoothing": ("label_smoothing", number),
    "max_gen_length": ("decoding.max_length", integer),
    "num_beams": ("decoding.beams", integer),
    "length_penalty": ("decoding.length_penalty", number),
    "repetition_penalty": ("decoding.repetition_penalty", number),
    "temperature": ("decoding.temperature", number),
    "top_k": ("decoding.top_k", integer),
    "top_p": ("decoding.top_p", number),
}
# Sizes of BERT, -1 for those of its own config.
BERT = {
    "hidden_size": "model.text.hidden_size",
    "num_hidden_layers": "model.text.num_layers",
    "num_attention_heads": "model.text.num_heads",
    "intermediate_size": "model.text.intermediate_size",
}
# Read together with others, below, and what each must be.
JOINT: dict[str, Convert] = {
    **dict.fromkeys(BERT, integer),
    **dict.fromkeys(("max_seq_length", "max_seq_a_length", "max_num_frames", "img_res", "kinetics", "seed"), integer),
    **dict.fromkeys(("per_gpu_train_batch_size", "effective_batch_size", "gradient_accumulation_steps"), integer),
    **dict.fromkeys(("num_gpus", "world_size", "num_train_epochs", "transfer_method"), integer),
    **dict.fromkeys(("backbone_coef_lr", "max_grad_norm", "warmup_ratio", "random_mask_prob"), number),
    **dict.fromkeys(("learn_mask_enabled", "sparse_mask_soft2hard", "freeze_backbone", "pretrained_2d"), switch),
    **dict.fromkeys(("deepspeed_fp16", "fairscale_fp16"), switch),
    **dict.fromkeys(("data_dir", "vidswin_size", "scheduler", "text_mask_type"), text),
    **dict.fromkeys(("mixed_precision_method", "pretrained_checkpoint", "resume_checkpoint"), text),
    "tag_to_mask": texts,
    "amp_opt_level": str,  # 0 or "O0"
}
# Has one value here, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "do_lower_case": (True, "captions are in lower case"),
    "add_od_labels": (False, "no second text is read"),
    "use_asr": (False, "no second text is read"),
    "freeze_embedding": (False, "all of BERT is trained"),
    "load_partial_weights": (False, "BERT takes all of a checkpoint or none"),
    "drop_worst_ratio": (0, "every word counts"),
    "att_mode": ("default", "others let features see the words that they foretell, or are not trained by anybody"),
    "grid_feat": (True, "without it the order of video tokens is wrong"),
    "adam_epsilon": (1e-8, "AdamW's is fixed"),
    "limited_samples": (-1, "the section subset says how many clips there are"),
    "num_keep_best": (1, "one caption is written"),
    "num_return_sequences": (1, "one caption is written"),
    "use_cbs": (False, "FAVDBench lacks the search with constraints itself"),
    "use_hypo": (False, "FAVDBench lacks the search with constraints itself"),
    "decoding_constraint": (False, "FAVDBench lacks the search with constraints itself"),
    "remove_bad_endings": (False, "FAVDBench lacks the search with constraints itself"),
    "scst": (False, "FAVDBench does not train with rewards either"),
    "debug": (False, "it is no run to repeat"),
    "debug_speed": (False, "it is no run to repeat"),
}
# What needs no value here, and why.
STAGES = "stages train and evaluate, each where something changed"
SPLITS = "splits are found in the dataset's metadata by their names"
VOCABULARY = "it lends BERT's sizes and vocab.txt alone; bring vocab.txt beside the captions"
COUNTED = "it is counted from other values"
PLACE = "processes and devices are found when the run starts"
UNUSED = "FAVDBench does not use it either"
NEEDLESS = {
    "config": "its values stand in the file",
    "output_dir": "results go to artifacts/avlformer",
    **dict.fromkeys(("train_yaml", "val_yaml", "test_yaml"), SPLITS),
    **dict.fromkeys(("do_train", "do_eval", "do_test", "evaluate_during_training"), STAGES),
    **dict.fromkeys(("model_name_or_path", "config_name", "tokenizer_name"), VOCABULARY),
    "drop_worst_after": "every word counts",
    **dict.fromkeys(("max_img_seq_length", "max_iter", "max_global_step", "global_iters_per_epoch"), COUNTED),
    "attn_mask_type": "it follows learn_mask_enabled",
    **dict.fromkeys(("od_label_conf", "unique_labels_on", "no_sort_by_conf"), "no second text is read"),
    "tagger_model_path": "the tagger comes with a library",
    **dict.fromkeys(("mask_img_feat", "max_masked_img_tokens", "patch_size", "output_hidden_states"), UNUSED),
    "weight_decay": "FAVDBench does not use it: its code says 0.2, as the preset does",
    "save_steps": "FAVDBench does not use it: evaluation comes every 3 epochs",
    "restore_ratio": "checkpoint_interval says when a run can be taken up again",
    "on_memory": "captions are always in memory",
    "per_gpu_eval_batch_size": "the section evaluate has its own",
    "zero_opt_stage": "strategy: fsdp shares the optimizer among devices",
    **dict.fromkeys(("device", "local_rank", "rank", "gpu", "distributed"), PLACE),
    "eval_model_dir": "model.model_name names the weights to begin with, and epochs: 0 leaves them as they are",
    "att_mask_expansion": "links of another number of tokens are refused",
    "reload_pretrained_swin": "model.video.model_name is read wherever model.model_name is none",
    **dict.fromkeys(("test_video_fname", "test_audio_fname"), "tasks.predict is given the files"),
    "min_constraints_to_satisfy": "FAVDBench lacks the search with constraints itself",
    **dict.fromkeys(("sc_train_sample_n", "sc_baseline_type", "cider_cached_tokens"), UNUSED),
}


def read_config(config: Mapping[str, Any]) -> Imported:
    """What the options say, to be laid over the preset favd_32frm, which holds what the original's code fixes.

    An option that the file lacks keeps the preset's value, that of the published command. InputError for one that is not
    known, and for a value that its option cannot have or that has no place here.
    """
    sections: dict[str, Any] = {}
    given = {key: value for key, value in config.items() if value is not None}
    reasons: dict[str, list[str]] = {}
    for key in (key for key in NEEDLESS if key in given):
        reasons.setdefault(NEEDLESS[key], []).append(key)
    notes = [f"{', '.join(keys)} left out: {why}" for why, keys in reasons.items()]
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in PLAIN:
            place, convert = PLAIN[key]
            put(sections, _place(place), converted(key, value, convert))
        elif key in JOINT:
            options[key] = converted(key, value, JOINT[key])
        elif key in FIXED:
            only, why = FIXED[key]
            if value != only:
                raise InputError(f"{key} is {value!r}; it must be {only!r}: {why}")
        elif key not in NEEDLESS:
            raise InputError(f"{key} is no option of FAVDBench; give its favd_32frm_default.json or a run's args.json")
    _read_sizes(options, sections)
    _read_training(options, sections, notes)
    _read_words(options, sections)
    _read_files(options, sections, notes)
    return Imported(preset=PRESET, sections=sections, notes=notes)


def _read_sizes(options: Mapping[str, Any], sections: dict[str, Any]) -> None:
    """Video Swin's and BERT's, the length of captions, and the links."""
    if "max_num_frames" in options:
        put(sections, "stores.num_frames", options["max_num_frames"])
        put(sections, "avlformer.model.video.num_frames", options["max_num_frames"])
    if "img_res" in options:
        put(sections, "avlformer.model.video.frame_size", options["img_res"])
    if "vidswin_size" in options:
        size = _choice(options, "vidswin_size", tuple(SIZES))
        for key, value in zip(("embed_dim", "depths", "num_heads"), SIZES[size], strict=True):
            put(sections, f"avlformer.model.video.{key}", value)
        window = 12 if size == "large" and options.get("img_res") == 384 else 7
        put(sections, "avlformer.model.video.window", [8, window, window])
    for key, place in BERT.items():
        if options.get(key, -1) != -1:
            put(sections, _place(place), options[key])
    length = options.get("max_seq_length", options.get("max_seq_a_length"))
    if options.get("max_seq_a_length", length) != length:
        raise InputError(f"max_seq_a_length is {options['max_seq_a_length']}; it must be max_seq_length ({length})")
    if length is not None:
        put(sections, "avlformer.model.text.max_length", length)
    if "learn_mask_enabled" in options or "sparse_mask_soft2hard" in options:
        mask = "hard" if options.get("sparse_mask_soft2hard") else "learned"
        put(sections, "avlformer.model.mask", mask if options.get("learn_mask_enabled", True) else "none")


def _read_training(options: Mapping[str, Any], sections: dict[str, Any], notes: list[str]) -> None:
    """Steps, rates and precision."""
    _read_batch(options, sections, notes)
    epochs = options.get("num_train_epochs", EPOCHS)
    if "num_train_epochs" in options:
        put(sections, f"{PHASE}.epochs", epochs)
    if "num_train_epochs" in options or "warmup_ratio" in options:
        put(sections, f"{PHASE}.warmup_epochs", round(options.get("warmup_ratio", WARMUP) * epochs, 6))
    if _choice(options, "scheduler", ("warmup_linear", "step")) == "step":
        for key, value in {"warmup_epochs": 0, "decay_epochs": [epochs / 2], "decay_gamma": 0.1}.items():
            put(sections, f"{PHASE}.{key}", value)
    if "max_grad_norm" in options:
        put(sections, f"{PHASE}.clip_grad", max(options["max_grad_norm"], 0.0))
    rate = options.get("backbone_coef_lr")
    if rate:
        put(sections, f"{PHASE}.backbone_lr", rate)
    if rate == 0 or "freeze_backbone" in options:
        put(sections, "avlformer.model.video.freeze", rate == 0 or options.get("freeze_backbone", False))
    for place in ("seed", "decoding.seed") if "seed" in options else ():
        put(sections, _place(place), options["seed"])
    _read_precision(options, sections, notes)


def _read_precision(options: Mapping[str, Any], sections: dict[str, Any], notes: list[str]) -> None:
    """Whether anything was computed in float16."""
    method = _choice(options, "mixed_precision_method", ("apex", "deepspeed", "fairscale"))
    level = _choice(options, "amp_opt_level", ("0", "O0", "1", "O1", "2", "O2", "3", "O3"))
    half = options.get("fairscale_fp16" if method == "fairscale" else "deepspeed_fp16", False)
    amp = half if method == "fairscale" else level[-1] != "0" or (half and method == "deepspeed")
    if "amp_opt_level" in options or "mixed_precision_method" in options:
        put(sections, f"{PHASE}.amp", amp)
    if amp:
        notes.append("warning: it was trained in float16; amp is bfloat16 here")


def _read_batch(options: Mapping[str, Any], sections: dict[str, Any], notes: list[str]) -> None:
    """The batch of a step, of all devices and all accumulated ones together."""
    each, whole = options.get("per_gpu_train_batch_size", 0), options.get("effective_batch_size", -1)
    steps = options.get("gradient_accumulation_steps", 1)
    if whole <= 0 and "per_gpu_train_batch_size" not in options:
        return
    devices = options.get("num_gpus", options.get("world_size"))
    if whole <= 0 and devices is None:
        notes.append(f"warning: num_gpus is not in it; {DEVICES} are counted, as published: check batch_size")
    put(sections, f"{PHASE}.batch_size", (whole if whole > 0 else each * (devices or DEVICES)) * max(steps, 1))


def _read_words(options: Mapping[str, Any], sections: dict[str, Any]) -> None:
    """Which words are asked for."""
    kind = _choice(options, "text_mask_type", ("random", "pos_tag"))
    if "text_mask_type" in options:
        put(sections, f"{PHASE}.masking", {"random": "random", "pos_tag": "parts"}[kind])
    if kind == "pos_tag" and options.get("random_mask_prob"):
        raise InputError(f"random_mask_prob is {options['random_mask_prob']}; it must be 0: one way for all captions")
    if "tag_to_mask" in options:
        unknown = [tag for tag in options["tag_to_mask"] if tag not in PARTS]
        if unknown:
            raise InputError(f"tag_to_mask has {unknown[0]!r}; it must be some of {', '.join(PARTS)}")
        put(sections, f"{PHASE}.parts", options["tag_to_mask"])


def _read_files(options: Mapping[str, Any], sections: dict[str, Any], notes: list[str]) -> None:
    """The dataset, and the weights to begin with."""
    if "data_dir" in options:
        put(sections, "download", {"source": options["data_dir"], "format": "favd"})
        if not options["data_dir"].startswith("/"):
            notes.append(f"check download.source: {options['data_dir']} is seen from the folder AVLFormer of FAVDBench")
    if "kinetics" in options or "vidswin_size" in options:
        size, kinetics = options.get("vidswin_size", "base"), options.get("kinetics", 600)
        name = f"weights/swin_{size}_patch244_window877_kinetics{kinetics}_22k.pth"
        put(sections, "avlformer.model.video.model_name", name)
    if options.get("pretrained_2d"):
        notes.append("warning: pretrained_2d: name the weights of a Swin for pictures in model.video.model_name")
    folder, resumed = options.get("pretrained_checkpoint"), options.get("resume_checkpoint")
    if folder not in ABSENT:
        if options.get("transfer_method", 0) > 0:
            raise InputError("transfer_method is 1; it must be 0: a checkpoint is loaded as a whole")
        put(sections, "avlformer.model.model_name", f"{folder.rstrip('/')}/model.bin")
    if resumed not in ABSENT:
        put(sections, "avlformer.model.model_name", resumed)


def _place(key: str) -> str:
    """Where a key of the family stands in params.yaml."""
    return f"avlformer.{key}" if key.startswith("model.") else f"{PHASE}.{key}"


def _choice(options: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    """The option's value, the first that is known where it has none."""
    value = options.get(key, known[0])
    if value not in known:
        raise InputError(f"{key} is {value!r}; it must be one of {', '.join(known)}")
    return value
