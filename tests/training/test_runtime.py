"""DeepSpeed files: what they may say, and which pairs of settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xlmega.errors import ConfigError
from xlmega.parallel.layout import Layout
from xlmega.training import runtime as runtimes
from xlmega.training.runtime import check_pair, read_runtime, runtime

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
MICRO = {"train_micro_batch_size_per_gpu": 4}


def told(settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        runtime(settings, what="ds.json")
    return str(caught.value)


def refused(layout: Layout, zero: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_pair(runtime({**MICRO, "zero_optimization": zero, **more}), layout)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_good(path: Path) -> None:
    found = read_runtime(path)
    check_pair(found, Layout(dp=2))
    if found.zero_stage <= 1:
        check_pair(found, Layout(tp=2, pp=2))
    assert found.precision == ("bf16" if "bf16" in json.loads(path.read_text()) else "fp32")


def test_all_five_are_shipped() -> None:
    assert {path.stem for path in DS_CONFIGS.glob("*.json")} == {
        "zero1_bf16", "zero1_pipeline_bf16", "zero2_bf16", "zero3_offload", "cpu_debug",
    }  # fmt: skip
    assert read_runtime(DS_CONFIGS / "zero3_offload.json").offload_optimizer


@pytest.mark.parametrize("key", sorted(runtimes._RECIPE_KEYS))
def test_every_misplaced_key_names_its_place(key: str) -> None:
    assert f"'{key}' lives in {runtimes._RECIPE_KEYS[key]}" in told({**MICRO, key: 1})


def test_misplaced_keys_are_told_together() -> None:
    text = told({"optimizer": {}, "gradient_clipping": 1.0, "train_batch_size": 8})
    assert all(place in text for place in ("[optimizer]", "optimizer.gradient_clipping", "training.batch_windows"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "must hold a JSON object"),
        (3, "must hold a JSON object"),
        ({}, 'must set "train_micro_batch_size_per_gpu"'),
        ({**MICRO, "zero_optimisation": {"stage": 3}}, "Did you mean 'zero_optimization'?"),
        ({**MICRO, "zero_optimization": {"overlap_com": True}}, "'zero_optimization.overlap_com'. Did you mean"),
        ({**MICRO, "bf16": {"enable": True}}, "no key 'bf16.enable'. Did you mean 'enabled'?"),
        ({**MICRO, "zero_optimization": 3}, "'zero_optimization' must be an object"),
        ({**MICRO, "bf16": True}, "'bf16' must be an object"),
        ({**MICRO, "bf16": {"enabled": "false"}}, "bf16.enabled must be true or false, but is 'false'"),
        ({**MICRO, "zero_optimization": {"stage": 4}}, "stage is 4; it may be 0, 1, 2 or 3"),
        ({**MICRO, "zero_optimization": {"stage": True}}, "stage is True"),
        ({**MICRO, "zero_optimization": {"stage": 1.0}}, "stage is 1.0"),
        ({**MICRO, "zero_optimization": {"stage": "2"}}, "stage is '2'"),
        ({**MICRO, "zero_optimization": {"stage": 1, "overlap_comm": True}}, "Drop overlap_comm, or use stage 2"),
        ({**MICRO, "zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "a checkpoint would be wrong"),
        ({**MICRO, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both bf16 and fp16. Keep one"),
        ({**MICRO, "zero_optimization": {"offload_optimizer": "cpu"}}, "'offload_optimizer' must be an object"),
        ({**MICRO, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'cpu' or 'none'"),
        ({**MICRO, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "'cpu' or 'none'"),
        ({**MICRO, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3"),
        ({"train_micro_batch_size_per_gpu": 0}, "whole number from 1, but is 0"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "whole number from 1, but is 'auto'"),
        ({"train_micro_batch_size_per_gpu": True}, "whole number from 1, but is True"),
    ],
)
def test_files_that_cannot_be_obeyed(settings: Any, words: str) -> None:
    assert words in told(settings)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, words in (
        ("none.json", "no DeepSpeed settings at .* ds_configs/"),
        ("bad.json", "not valid JSON"),
        ("binary.json", "not valid JSON"),
        (".", "cannot be read as a JSON file"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_runtime(tmp_path / name)


def test_pairs_that_cannot_work_name_the_nearest_that_does() -> None:
    bf16 = {"bf16": {"enabled": True}}
    offload = {"offload_optimizer": {"device": "cpu"}}
    assert "ZeRO-2 with pp=2" in refused(Layout(pp=2), {"stage": 2})
    assert "Use ZeRO-1 with pp, or pp=1 with a larger tp" in refused(Layout(pp=4), {"stage": 3})
    assert "ZeRO-0 with bf16" in refused(Layout(), {"stage": 0}, **bf16)
    assert "Use ZeRO-1" in refused(Layout(), {}, fp16={"enabled": True})
    assert "needs ZeRO stage 1, 2 or 3" in refused(Layout(), {"stage": 0, **offload})
    assert "Use stage 2 (pp=1) or 3" in refused(Layout(), {"stage": 1, **offload})


def test_pairs_that_work() -> None:
    for stage in (0, 1):
        check_pair(runtime({**MICRO, "zero_optimization": {"stage": stage}}), Layout(pp=4, dp=2))
    for stage in (1, 2, 3):
        check_pair(
            runtime({**MICRO, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}), Layout(2, 1, 2)
        )
    for stage in (2, 3):
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        check_pair(runtime({**MICRO, "zero_optimization": zero}), Layout(dp=4))


def test_what_deepspeed_is_given() -> None:
    given = {**MICRO, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    settings = runtime(given).for_deepspeed(gradient_clipping=0.5, micro_batches=8, num_parameters=5000)
    assert settings["gradient_accumulation_steps"] == 8 and settings["gradient_clipping"] == 0.5
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    # A bucket is allocated whole: none is larger than the model.
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 5000}
    asked = runtime({**MICRO, "zero_optimization": {"stage": 2, "reduce_bucket_size": 7}})
    settings = asked.for_deepspeed(gradient_clipping=0.5, micro_batches=8, num_parameters=5000)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert "data_types" not in given and given["zero_optimization"] == {"stage": 2}  # what was given is left alone
    scheduled = runtime({**MICRO, "zero_optimization": {"stage": 1}})
    assert scheduled.for_deepspeed(gradient_clipping=1.0, micro_batches=8)["gradient_accumulation_steps"] == 1
    bare = runtime(MICRO)
    assert (bare.zero_stage, bare.precision, bare.uses_schedule) == (0, "fp32", True)
    assert bare.for_deepspeed(gradient_clipping=1.0, micro_batches=1)["gradient_clipping"] == 0.0  # the engine clips


@pytest.mark.torch
def test_known_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, theirs in (
        ("bf16", DeepSpeedBF16Config), ("fp16", DeepSpeedFP16Config), ("zero_optimization", DeepSpeedZeroConfig)
    ):  # fmt: skip
        fields = {field.alias or key for key, field in theirs.model_fields.items()}
        assert set(runtimes._TABLE_KEYS[name]) <= fields, name
