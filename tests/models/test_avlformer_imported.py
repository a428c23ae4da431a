"""FAVDBench's options: each has its place or a reason, others are named; and the presets of avlformer, whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.avlformer import config as configs
from models.avlformer.imported import FIXED, JOINT, NEEDLESS, PLAIN, read_config
from models.avlformer.model import Finetune
from models.family import Facts, InputError
from tasks import params, preset

ROOT = Path(__file__).parents[2]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(30_517))]
# As favd_32frm_default.json sets them.
DEFAULT: dict[str, Any] = {
    "data_dir": "datasets", "train_yaml": "metadata/train_32frames.yaml", "val_yaml": "metadata/val_32frames.yaml",
    "do_train": True, "evaluate_during_training": True, "model_name_or_path": "captioning/bert-base-uncased/",
    "img_feature_dim": 512, "max_seq_length": 300, "max_seq_a_length": 300, "max_img_seq_length": 1257,
    "max_gen_length": 115, "do_lower_case": True, "mask_prob": 0.25, "max_masked_tokens": 75, "on_memory": True,
    "per_gpu_train_batch_size": 1, "per_gpu_eval_batch_size": 1, "num_workers": 16, "learning_rate": 1e-4,
    "backbone_coef_lr": 0.05, "weight_decay": 0.05, "gradient_accumulation_steps": 1, "num_train_epochs": 150,
    "restore_ratio": -1, "mixed_precision_method": "apex", "amp_opt_level": 0, "zero_opt_stage": 1,
    "deepspeed_fp16": False, "fairscale_fp16": False, "kinetics": "600", "use_checkpoint": True,
}  # fmt: skip
# The rest of a run's args.json: the command's own, defaults, and what the run found out.
ARGS = DEFAULT | {
    "config": "src/configs/favd_32frm_default.json", "output_dir": "output/", "test_yaml": ["coco_caption/test.yaml"],
    "do_eval": False, "do_test": False, "config_name": "", "tokenizer_name": "", "num_hidden_layers": -1,
    "hidden_size": -1, "num_attention_heads": -1, "intermediate_size": -1, "load_partial_weights": False,
    "freeze_embedding": False, "drop_out": 0.1, "tie_weights": False, "label_smoothing": 0, "drop_worst_ratio": 0,
    "drop_worst_after": 0, "add_od_labels": False, "od_label_conf": 0.0, "use_asr": False, "unique_labels_on": False,
    "no_sort_by_conf": False, "attn_mask_type": "learn_vid_att", "text_mask_type": "random",
    "tag_to_mask": ["noun", "verb"], "mask_tag_prob": 0.8, "random_mask_prob": 0, "tagger_model_path": "models/flair",
    "mask_img_feat": False, "max_masked_img_tokens": 10, "effective_batch_size": -1, "limited_samples": -1,
    "per_gpu_train_batch_size": 2, "per_gpu_eval_batch_size": 2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "scheduler": "warmup_linear", "warmup_ratio": 0.1, "logging_steps": 20, "save_steps": 1404, "device": "cuda",
    "seed": 88, "local_rank": 0, "pretrained_checkpoint": "", "resume_checkpoint": "None", "eval_model_dir": "",
    "debug": False, "debug_speed": False, "max_num_frames": 32, "img_res": 224, "patch_size": 32, "grid_feat": True,
    "vidswin_size": "base", "pretrained_2d": False, "freeze_backbone": False, "freeze_passt": False,
    "reload_pretrained_swin": False, "learn_mask_enabled": True, "loss_sparse_w": 0.5, "sparse_mask_soft2hard": False,
    "att_mode": "default", "lambda_": 0.1, "transfer_method": 0, "att_mask_expansion": 0, "test_video_fname": "None",
    "test_audio_fname": "None", "num_beams": 1, "num_keep_best": 1, "num_return_sequences": 1, "temperature": 1,
    "top_k": 0, "top_p": 1, "repetition_penalty": 1, "length_penalty": 1, "output_hidden_states": False,
    "use_cbs": False, "min_constraints_to_satisfy": 2, "use_hypo": False, "decoding_constraint": False,
    "remove_bad_endings": False, "scst": False, "sc_train_sample_n": 5, "sc_baseline_type": "greedy",
    "cider_cached_tokens": "coco_caption/gt", "rank": 0, "gpu": 0, "world_size": 8, "num_gpus": 8,
    "distributed": True, "max_iter": 70_200, "max_global_step": 70_200, "global_iters_per_epoch": 468,
}  # fmt: skip


def found(**options: Any) -> dict[str, Any]:
    """What options alone say of the phase and of the model."""
    sections = read_config(options).sections.get("avlformer", {})
    return {**sections.get("finetune", {}), **({"model": sections["model"]} if "model" in sections else {})}


def built(name: str, sections: dict[str, Any] | None = None) -> tuple[configs.FinetuneConfig, Finetune]:
    """A preset's config over params.yaml and its module, without memory."""
    values = params.read(ROOT / "params.yaml")
    preset.overlay(values, {"avlformer": preset.load_preset("avlformer", name)["avlformer"]})
    preset.overlay(values, sections or {})
    sections = values["avlformer"]["finetune"] | {"model": values["avlformer"]["model"]}
    fields = {k: v for k, v in sections.items() if k in configs.FinetuneConfig.__annotations__}
    config = params.typed(configs.FinetuneConfig, fields, "avlformer.finetune")
    with torch.device("meta"):
        return config, Finetune(config, Facts({"wordpiece": VOCABULARY}, 0.0, 1.0))


# --- presets -------------------------------------------------------------------------------------------------------------


def test_the_published_model_has_its_parameters() -> None:
    config, module = built("favd_32frm")
    assert configs.num_video_tokens(config.model.video) == 784
    assert configs.num_audio_tokens(config.model.audio) == 473
    num = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    assert num["video"] == 87_638_984
    assert num["video_proj"] == 1024 * 512 + 512
    # The published body has the norm of a classifier which nobody asks: head.0, a weight and a bias.
    assert num["audio"] + 2 * 768 == 85_343_232
    assert num["audio_proj"] == 768 * 512 + 512
    answers = sum(p.numel() for part in (module.bert.head, module.bert.decoder) for p in part.parameters())
    assert answers == 24_063_546
    # What it counts as BERT's besides: img_embedding, our `features`, and the pooler, which nobody reads.
    assert num["bert"] - answers + num["features"] + 768 * 768 + 768 == 109_876_224
    assert num["links"] == (784 + 473) ** 2 == 1_580_049


def test_the_small_model_is_the_corrected_one() -> None:
    config, module = built("favd_small")
    assert not config.model.legacy
    assert configs.num_video_tokens(config.model.video) == 392
    # As torchvision counts its swin3d_t, without the classifier of 400 classes.
    assert sum(p.numel() for p in module.video.parameters()) == 28_158_070 - 768 * 400 - 400
    assert config.model.text.max_length == config.decoding.max_length == 300


# --- options -------------------------------------------------------------------------------------------------------------


def test_every_option_has_one_place_or_one_reason() -> None:
    kinds = [set(PLAIN), set(JOINT), set(FIXED), set(NEEDLESS)]
    assert sum(map(len, kinds)) == len(set.union(*kinds)) == len(ARGS)
    assert set.union(*kinds) == set(ARGS)
    assert read_config({}).sections == {} and not read_config({}).notes


def test_a_published_run_is_the_preset() -> None:
    imported = read_config(ARGS)
    sections = preset.load_preset("avlformer", imported.preset)
    changes = preset.overlay(sections, imported.sections)
    assert [change.partition(":")[0] for change in changes] == ["download"]
    assert imported.sections["download"] == {"source": "datasets", "format": "favd"}
    told = [key for note in imported.notes[:-1] for key in note.partition(" left out: ")[0].split(", ")]
    assert sorted(told) == sorted(NEEDLESS)
    assert imported.notes[-1].startswith("check download.source: datasets is seen from")


def test_the_default_options_alone_leave_devices_open() -> None:
    imported = read_config(DEFAULT)
    assert imported.sections["avlformer"]["finetune"]["batch_size"] == 8
    assert any("num_gpus is not in it; 8 are counted" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("options", "place", "value"),
    [
        ({"per_gpu_train_batch_size": 3, "num_gpus": 4, "gradient_accumulation_steps": 2}, "batch_size", 24),
        ({"effective_batch_size": 64, "per_gpu_train_batch_size": 3, "num_gpus": 4}, "batch_size", 64),
        ({"num_train_epochs": 20, "warmup_ratio": 0.25}, "warmup_epochs", 5),
        ({"scheduler": "step", "num_train_epochs": 21}, "decay_epochs", [10.5]),
        ({"scheduler": "step", "num_train_epochs": 21}, "warmup_epochs", 0),
        ({"max_grad_norm": -1}, "clip_grad", 0),
        ({"learning_rate": "3e-5"}, "lr", 3e-5),
        ({"seed": 7}, "seed", 7),
        ({"seed": 7}, "decoding.seed", 7),
        ({"backbone_coef_lr": 0}, "model.video.freeze", True),
        ({"freeze_backbone": True}, "model.video.freeze", True),
        ({"learn_mask_enabled": True, "sparse_mask_soft2hard": True}, "model.mask", "hard"),
        ({"learn_mask_enabled": False}, "model.mask", "none"),
        ({"text_mask_type": "pos_tag"}, "masking", "parts"),
        ({"tag_to_mask": ["adjective", "number"]}, "parts", ["adjective", "number"]),
        ({"hidden_size": 384, "num_hidden_layers": -1}, "model.text", {"hidden_size": 384}),
        ({"vidswin_size": "large"}, "model.video.embed_dim", 192),
        ({"vidswin_size": "large", "img_res": 384}, "model.video.window", [8, 12, 12]),
        ({"kinetics": 400}, "model.video.model_name", "weights/swin_base_patch244_window877_kinetics400_22k.pth"),
        ({"amp_opt_level": "O1"}, "amp", True),
        ({"mixed_precision_method": "fairscale", "fairscale_fp16": True}, "amp", True),
        ({"mixed_precision_method": "fairscale", "deepspeed_fp16": True}, "amp", False),
        ({"mixed_precision_method": "deepspeed", "deepspeed_fp16": True}, "amp", True),
        ({"pretrained_checkpoint": "out/checkpoint-3-1404/"}, "model.model_name", "out/checkpoint-3-1404/model.bin"),
        ({"resume_checkpoint": "out/model.bin"}, "model.model_name", "out/model.bin"),
    ],
)
def test_options_in_their_places(options: dict[str, Any], place: str, value: Any) -> None:
    here: Any = found(**options)
    for key in place.split("."):
        here = here[key]
    assert here == value


def test_more_frames_are_stored_and_read() -> None:
    sections = read_config({"max_num_frames": 64}).sections
    assert sections["stores"]["num_frames"] == 64
    assert sections["avlformer"]["model"]["video"]["num_frames"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 3}, "frames is no option of FAVDBench"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"num_beams": 1.5}, "num_beams is 1.5; it must be a whole number"),
        ({"tie_weights": 1}, "tie_weights is 1; it must be true or false"),
        ({"data_dir": 3}, "data_dir is 3; it must be a text"),
        ({"tag_to_mask": "noun"}, "tag_to_mask is 'noun'; it must be a list of texts"),
        ({"tag_to_mask": ["noun", "colour"]}, "tag_to_mask has 'colour'; it must be some of noun"),
        ({"text_mask_type": "bert_attn"}, "text_mask_type is 'bert_attn'; it must be one of random, pos_tag"),
        ({"text_mask_type": "pos_tag", "random_mask_prob": 0.2}, "random_mask_prob is 0.2; it must be 0"),
        ({"max_seq_length": 300, "max_seq_a_length": 40}, r"max_seq_a_length is 40; it must be max_seq_length \(300\)"),
        ({"vidswin_size": "tiny"}, "vidswin_size is 'tiny'; it must be one of base, large"),
        ({"scheduler": "cosine"}, "scheduler is 'cosine'"),
        ({"att_mode": "full"}, "att_mode is 'full'; it must be 'default': others let features see the words"),
        ({"add_od_labels": True}, "add_od_labels is True; it must be False: no second text is read"),
        ({"pretrained_checkpoint": "a/", "transfer_method": 1}, "transfer_method is 1; it must be 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(options)


def test_the_command_reads_args_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "args.json").write_text(json.dumps(ARGS | {"learning_rate": 3e-5}, indent=4, sort_keys=True))
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "params.yaml").read_text()
    monkeypatch.setattr(sys, "argv", ["tasks.preset", "avlformer", str(tmp_path / "args.json"), "--print"])
    preset.main()
    told = capsys.readouterr().out
    assert "→ 3e-05" in told
    assert "args.json: weight_decay left out: FAVDBench does not use it" in told
    assert (tmp_path / "params.yaml").read_text() == before
    (tmp_path / "args.json").write_text('{"learning_rate": "fast"}')
    with pytest.raises(InputError, match=r"args\.json: learning_rate is 'fast'"):
        preset.main()


def test_avlformer_reads_config_files() -> None:
    assert models.load("avlformer").read_config is read_config
