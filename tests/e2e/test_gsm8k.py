"""Problems in the form of GSM8K through complete runs: read as published, judged by math-verify, the worked solution
shown to the teacher alone."""

from __future__ import annotations

import pytest

from asd_megatron.observe.dumps import Dump
from tests.data.tokenizers import word_tokenizer
from tests.e2e.world import World, dump, make_world, metrics, write_lines

PROBLEMS = (
    (
        "A tram has 34 people. At a stop 9 leave and 16 get on. How many people are on the tram?",
        "34 - 9 = <<34-9=25>>25 people stay.\nThen there are 25 + 16 = <<25+16=41>>41.\n#### 41",
    ),
    (
        "Noor reads 18 pages a day. How many pages does she read in a week?",
        "A week has 7 days.\nShe reads 18 * 7 = <<18*7=126>>126 pages.\n#### 126",
    ),
    ("A rope of 96 m is cut into 8 equal parts. How long is a part?", "A part has 96 / 8 = <<96/8=12>>12 m.\n#### 12"),
    (
        "A farm sells 1,250 eggs in March and twice as many in April. How many in both?",
        "April: 2 * 1250 = <<2*1250=2500>>2,500.\nBoth: 1250 + 2500 = <<1250+2500=3750>>3,750.\n#### 3,750",
    ),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    texts = [text for problem in PROBLEMS for text in problem]
    tokenizer = word_tokenizer([*texts, " #### 41 126 12"])
    world = make_world(tmp_path_factory.mktemp("gsm8k"), vocab_size=len(tokenizer) + 1, max_position_embeddings=512)
    for old in world.model.glob("*token*"):
        old.unlink()
    tokenizer.save_pretrained(world.model)
    write_lines(world.problems, [{"question": question, "answer": answer} for question, answer in PROBLEMS])
    return world


@pytest.mark.parametrize("name", ["grpo", "antisd"])
def test_a_random_model(world: World, name: str) -> None:
    """No response is right. GRPO has nothing to learn from; AntiSD has, from the data's solutions."""
    run = world.train(
        name,
        run={"steps": 2, "dump_rollouts": True},
        algorithm={"name": name, "log_pmi": True},
        data={"format": "raw", "raw_prompt": "Question: {prompt}\nAnswer:", "test": str(world.problems)},
        gate={"h_warm": 0.01} if name == "antisd" else {},
        reward={"name": "math", "workers": 1, "timeout_seconds": 60.0},
        sampling={"problems_per_step": 2, "max_prompt_tokens": 128, "max_response_tokens": 16},
    )
    rows = metrics(run)
    assert [row["evaluation/accuracy"] for row in (rows[0], rows[-1])] == [0.0, 0.0]
    found: Dump = dump(run, 1)
    assert {e.demonstration_source for e in found.examples} == {"reference"}
    for row in rows[1:]:
        assert row["reward/mean"] == 0 and row["reward/errors"] == row["reward/timeouts"] == 0
        assert (row["optimizer/grad_norm"] > 0) == (name == "antisd"), row
