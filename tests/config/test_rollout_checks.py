"""Impossible settings of rollouts: each is refused, says what to change, and the change is accepted."""

from __future__ import annotations

import pytest
from yaml import safe_load

from asd_megatron.config import Recipe, check_devices, check_model, dump_recipe, make_recipe
from asd_megatron.config.refusals import RENAMED_KEYS, dotted_keys
from asd_megatron.config.rollout_checks import device_findings
from asd_megatron.errors import UserError
from tests.config.test_checks import make, refusal

S = "rollout.engine=sglang "
URLS = S + 'rollout.server_urls=["http://127.0.0.1:3","http://127.0.0.1:4"] '
FAR = S + 'rollout.server_urls=["http://10.1.2.3:30000"] '
HOSTS = S + "rollout.servers=2 rollout.server_hosts=[node1,node2] "
COLOCATED = S + "rollout.placement=colocated "
FP8 = S + "rollout.quantization=fp8 "
IS = " algorithm.importance_correction=truncated"


@pytest.mark.parametrize(
    ("bad", "message", "good"),
    [
        ("rollout.servers=2", "rollout.servers is read only with rollout.engine sglang", S + "rollout.servers=2"),
        ("rollout.overlap=true", "rollout.overlap is read only with", S + "rollout.overlap=true" + IS),
        ("rollout.routing_replay=engine", "the experts that SGLang servers chose", S + "rollout.routing_replay=engine"),
        ("rollout.routing_replay=engine", "or rollout.routing_replay scoring", "rollout.routing_replay=scoring"),
        (S + "rollout.routing_replay=engine rollout.router=start", "does not pass the request for routed experts on",
         S + "rollout.router=start"),
        (URLS + "rollout.servers=2", "names running ones: leave one of the two out", S + "rollout.servers=2"),
        (URLS + "rollout.router=start", "give the URL of their router", URLS + "rollout.router=http://127.0.0.1:5"),
        (URLS + "rollout.placement=colocated", "needs servers that the run starts", S + "rollout.placement=colocated"),
        (S + 'rollout.server_urls=["10.0.0.1:3"]', "is no URL", URLS),
        (S + 'rollout.server_urls=["http://a:3","http://a:3"]', "a server twice",
         URLS),
        (S + 'rollout.server_devices=["0"] rollout.servers=2', "devices of 1 servers and rollout.servers is 2",
         S + 'rollout.server_devices=["0","1"] rollout.servers=2'),
        (S + "rollout.router=somewhere", "neither `start` nor a URL", S + "rollout.router=start"),
        (S + "rollout.router=http://127.0.0.1:5", "does not know the servers that the run starts",
         URLS + "rollout.router=http://127.0.0.1:5"),
        (S + "rollout.weight_sync_folder=w", "read only with rollout.weight_sync disk",
         S + "rollout.weight_sync_folder=w rollout.weight_sync=disk"),
        (S + "rollout.weight_sync=cuda_ipc", "set rollout.placement colocated",
         S + "rollout.weight_sync=cuda_ipc rollout.placement=colocated"),
        (URLS + "rollout.weight_sync_address=0.0.0.0", "let anybody join", URLS),
        (FAR + "rollout.weight_sync_address=127.0.0.1", "cannot be reached from http://10.1.2.3:30000", FAR),
        (HOSTS + "rollout.weight_sync_address=127.0.0.1", "cannot be reached from node1", HOSTS),
        (S + "rollout.server_hosts=[node1+node2] rollout.server_tensor_parallel=2 rollout.placement=colocated",
         "name one host for each server", HOSTS + "rollout.placement=colocated"),
        (HOSTS + 'rollout.server_urls=["http://node3:3"]', "leave one of the two out", HOSTS),
        (S + "rollout.server_hosts=[node1,node2]", "room for 2 servers and rollout.servers is 1", HOSTS),
        (S + "rollout.server_hosts=[-oProxyCommand=x]", "is no host's name or address", S + "rollout.server_hosts=[a]"),
        (S + "rollout.server_hosts=[a+b]", "make rollout.server_tensor_parallel even",
         S + "rollout.server_hosts=[a+b] rollout.server_tensor_parallel=2"),
        (S + "rollout.server_hosts=[a+a]", "on one host or on two different ones", S + "rollout.server_hosts=[a]"),
        (HOSTS + "rollout.server_hosts=[a,a]", "names a twice", HOSTS),
        (HOSTS + "rollout.server_tensor_parallel=2 rollout.server_hosts=[a+b,b+c]", "names b twice", HOSTS),
        (HOSTS + "rollout.server_tensor_parallel=2 rollout.server_hosts=[a+b,c]", "mixes servers", HOSTS),
        (HOSTS + "rollout.server_launcher=there", "write {host} for the host's name",
         HOSTS + "rollout.server_launcher=there={host}"),
        (HOSTS + "rollout.server_launcher=there=\"{host}", "close its quotes", HOSTS),
        (S + "rollout.server_port=30000", "read only with rollout.server_hosts", HOSTS + "rollout.server_port=30000"),
        (S + "rollout.server_keys=k", "servers that the run starts get new ones", URLS + "rollout.server_keys=k"),
        (HOSTS + 'rollout.servers=3 rollout.server_devices=["0","0","0"]', "names device 0 of node1 twice",
         HOSTS + 'rollout.servers=3 rollout.server_devices=["0","0","1"]'),
        (S + 'rollout.server_hosts=[a+b] rollout.server_tensor_parallel=4 rollout.server_devices=["0,1,2,3"]',
         "rollout.server_tensor_parallel 4 needs 2 devices",
         S + 'rollout.server_hosts=[a+b] rollout.server_tensor_parallel=4 rollout.server_devices=["0,1"]'),
        (URLS + "rollout.weight_sync=cuda_ipc", "set rollout.weight_sync distributed (or disk)",
         URLS + "rollout.weight_sync=disk"),
        (S + "rollout.weight_sync=disk rollout.weight_sync_address=10.0.0.1", "read only with rollout.weight_sync dist",
         S + "rollout.weight_sync_address=10.0.0.1"),
        (S + "rollout.weight_sync=disk rollout.weight_sync_bucket_mib=64", "not read with rollout.weight_sync disk",
         S + "rollout.weight_sync_bucket_mib=64"),
        (S + "rollout.weight_sync_full_every=5 rollout.weight_sync=disk", "read only with rollout.weight_sync dist",
         S + "rollout.weight_sync_full_every=5"),
        (COLOCATED + "rollout.weight_sync_full_every=5", "give up theirs while the trainer works", COLOCATED),
        (S + "rollout.weight_sync_full_every=5 model.dtype=float32", "nearly every element of float32 weights",
         S + "rollout.weight_sync_full_every=5 model.dtype=bfloat16"),
        (S + 'rollout.server_devices=["0,1"]', "rollout.server_tensor_parallel 1 needs as many",
         S + 'rollout.server_devices=["0,1"] rollout.server_tensor_parallel=2'),
        (S + 'rollout.server_devices=["0,1","1,2"] rollout.servers=2 rollout.server_tensor_parallel=2',
         "names device 1 twice",
         S + 'rollout.server_devices=["0,1","2,3"] rollout.servers=2 rollout.server_tensor_parallel=2'),
        (S + "rollout.verify_weights=false rollout.verify_tolerance=0.1", "read only with rollout.verify_weights true",
         S + "rollout.verify_tolerance=0.1"),
        (S + "rollout.offload_optimizer=true", "frees memory for servers on the trainer's devices",
         S + "rollout.offload_optimizer=true rollout.placement=colocated"),
        (S + "rollout.partial_rollouts=true" + IS, "rollout.oversampling is 1: raise it",
         S + "rollout.partial_rollouts=true rollout.oversampling=1.5" + IS),
        (S + "rollout.partial_rollouts=true rollout.oversampling=1.5 sampling.stop=[x]" + IS, "would be missed",
         S + "sampling.stop=[x]"),
        (S + "rollout.overlap=true", "set algorithm.importance_correction truncated or masked",
         S + "rollout.overlap=true" + IS),
        (S + "rollout.overlap=true rollout.max_staleness=0" + IS, "discards every rollout of rollout.overlap",
         S + "rollout.max_staleness=0"),
        (S + "rollout.overlap=true rollout.placement=colocated" + IS, "set rollout.placement disaggregated",
         S + "rollout.overlap=true" + IS),
        ("rollout.quantization=fp8", "rollout.quantization is read only with rollout.engine sglang", FP8),
        (FP8 + 'rollout.server_args={"quantization":"fp8"}', "rollout.server_args quantization: rollout.quantization",
         FP8),
        (FP8 + 'rollout.server_args={"--load_format":"auto"}', "rollout.server_args load-format: rollout.quantization",
         FP8),
        (S + 'rollout.server_args={"quantization":"w8a8_fp8"}', "set rollout.quantization fp8", FP8),
        (FP8 + "model.dtype=float32", "set model.dtype bfloat16", FP8 + "model.dtype=bfloat16"),
    ],
)  # fmt: skip
def test_refused_with_the_remedy(bad: str, message: str, good: str) -> None:
    assert message in refusal(bad)
    make(good)


SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 512,
    "intermediate_size": 1024,
}


@pytest.mark.parametrize(
    ("ranks", "sizes", "message"),
    [
        (2, {}, None),
        (4, {}, "has 64 rows of key heads of the model: set rollout.quantization none, or lower rollout.server_tens"),
        (1, {"hidden_size": 576}, "576 hidden units of the model: set rollout.quantization none$"),
        (2, {"intermediate_size": 1152}, "576 feed-forward units"),
        (2, {"moe_intermediate_size": 192}, "96 feed-forward units"),  # of an expert; intermediate_size is not read
        (8, {"head_dim": 128}, None),  # a key head of 128 rows is on two ranks
        (8, {"head_dim": 128, "num_attention_heads": 12}, "192 rows of query heads"),
    ],
)
def test_a_rank_of_a_quantised_server_has_complete_blocks(
    ranks: int, sizes: dict[str, int], message: str | None
) -> None:
    recipe = make(FP8 + f"rollout.server_tensor_parallel={ranks}")
    if message is None:
        return check_model(recipe, SIZES | sizes)
    check_model(make(S + f"rollout.server_tensor_parallel={ranks}"), SIZES | sizes)
    with pytest.raises(UserError, match=message):
        check_model(recipe, SIZES | sizes)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_model_whose_scales_sglang_does_not_load_is_refused(architecture: str) -> None:
    check_model(make(S), {"architectures": [architecture]})
    check_model(make(FP8), {"architectures": ["Qwen3ForCausalLM"]})
    with pytest.raises(UserError, match=f"the scales of a {architecture}: set rollout.quantization none"):
        check_model(make(FP8), {"architectures": [architecture]})


def test_rollouts_of_quantised_servers_are_corrected_unless_the_recipe_says_otherwise() -> None:
    def correction(text: str) -> str:
        recipe = make(text)
        again = make_recipe(safe_load(dump_recipe(recipe)))  # what the run folder says, read back
        assert again == recipe
        return recipe.algorithm.importance_correction

    assert correction(FP8) == correction(FP8 + "algorithm.clip_high=0.3") == "truncated"
    assert correction(FP8 + "algorithm.importance_level=sequence") == "truncated"
    assert correction(FP8 + "algorithm.importance_correction=none") == "none"
    assert correction(FP8 + "algorithm.importance_correction=masked") == "masked"
    assert correction(S) == correction(S + "rollout.quantization=none") == "none"


def test_virtual_stages_and_context_parallelism_are_fine_with_servers() -> None:
    make(S + "parallelism.virtual_pipeline=2 parallelism.pipeline=2 parallelism.context=2 data.test=t")
    assert "rollout.engine sglang" in refusal("parallelism.context=2")


@pytest.mark.parametrize(
    ("bad", "message", "good"),
    [
        (COLOCATED, "NCCL does not connect two processes", COLOCATED + "rollout.weight_sync=disk"),
        (S, "would take the trainer's devices", S + 'rollout.server_devices=["4"]'),
        (S + 'rollout.server_devices=["3"]', "names 3, on which the trainer's ranks run",
         S + 'rollout.server_devices=["4"]'),
        (COLOCATED + "rollout.weight_sync=disk rollout.servers=2", "would share the same devices: name theirs",
         COLOCATED + 'rollout.weight_sync=disk rollout.servers=2 rollout.server_devices=["2","3"]'),
        (COLOCATED + 'rollout.weight_sync=cuda_ipc rollout.server_devices=["3,4"] rollout.server_tensor_parallel=2',
         "none runs on device 4, .*: name some of 2, 3,",
         COLOCATED + 'rollout.weight_sync=cuda_ipc rollout.servers=2 rollout.server_devices=["3","2"]'),
        (S + 'rollout.server_devices=["4"] rollout.server_args={"device":"cpu"}', "rollout.server_args device cpu",
         S + 'rollout.server_devices=["4"] rollout.server_args={}'),
    ],
)  # fmt: skip
def test_what_cannot_work_on_gpus(bad: str, message: str, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the trainer has 2 and 3
    with pytest.raises(UserError, match=message):
        check_devices(make(bad), cuda=True)
    check_devices(make(bad), cuda=False)
    check_devices(make(good), cuda=True)


def test_devices_of_another_machine_are_not_the_servers() -> None:
    rollout = make(S + 'rollout.server_devices=["0"]').rollout
    second = {"RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert list(device_findings(rollout, second)) == []
    assert len(list(device_findings(rollout, {**second, "RANK": "1"}))) == 1


def test_servers_on_other_nodes_have_all_devices_of_theirs_unless_several_share_one() -> None:
    trainer = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    assert list(device_findings(make(HOSTS).rollout, trainer)) == []
    assert list(device_findings(make(HOSTS + 'rollout.server_devices=["0","0"]').rollout, trainer)) == []
    (finding,) = device_findings(make(HOSTS + "rollout.servers=4").rollout, trainer)
    assert "several of the 4 servers would share the devices of a host" in finding


def test_names_of_different_kinds_are_not_compared() -> None:
    rollout = make(COLOCATED + "rollout.weight_sync=cuda_ipc rollout.server_devices=[GPU-aa]").rollout
    assert list(device_findings(rollout, {"CUDA_VISIBLE_DEVICES": "0,1"})) == []
    assert len(list(device_findings(rollout, {"CUDA_VISIBLE_DEVICES": "GPU-bb"}))) == 1


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(old: str, new: str) -> None:
    section, _, key = old.partition(".")
    assert new in dotted_keys(Recipe) and old not in dotted_keys(Recipe)
    for refused in (lambda: make(f"{old}=1"), lambda: make_recipe({section: {key: 1}})):
        with pytest.raises(UserError, match=rf"{old}.* now called {new}"):
            refused()
