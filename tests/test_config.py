import ast
import subprocess
import sys

import pytest
from conftest import ROOT, run

from atlas.config import FIELDS, Config, load_config
from atlas.errors import AtlasError


def test_files_overlay_left_to_right_and_the_command_line_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("lora_rank: 2\nlr: 0.5\n")
    (tmp_path / "b.yaml").write_text("lr: 1e-3\nseed: 7\n")
    config = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["seed=8"])
    assert (config.lora_rank, config.lr, config.seed, config.epochs) == (
        2,
        1e-3,
        8,
        Config().epochs,
    )


def test_text_is_taken_as_it_stands():
    assert (
        load_config([], ["name=no"]).name == "no"
        and load_config([], ["name=1"]).name == "1"
        and load_config([], ["name=null"]).name is None
    )
    assert load_config([], ["visual_weights=false", "amp=off"]).visual_weights is False


def test_every_shipped_config_loads():
    for path in ROOT.glob("configs/*.yaml"):
        if path.name != "class_map.yaml":
            load_config([path])


@pytest.mark.parametrize(
    "word, what",
    [
        ("lora_rnk=8", "lora_rank"),
        ("lora_rank=eight", "no int"),
        ("lora_rank=1.5", "no int"),
        ("lora_rank=true", "no int"),
        ("lora_rank=-1", "at least 0"),
        ("lr=.nan", "at least 0"),
        ("audio=beats", "vggish"),
        ("heads=3", "multiple of heads=3"),
        ("width=20", "multiple"),
        ("lora_dropout=1.5", "at most"),
        ("warmup=2", "at most 1"),
        ("lra_scope=lora lora_rank=0", "lra_scope=trainable"),
        ("protocol=tfcl lr_rest=0 method=finetune", "small lr_rest"),
        ("justaword", "key=value"),
    ],
)
def test_bad_values_name_the_key_and_the_way_out(word, what):
    with pytest.raises(AtlasError, match=what):
        load_config([], word.split())


def test_every_key_is_read_somewhere():
    """A key that no line reads as config.KEY is a knob that does nothing."""
    read = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("atlas/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "config"
                and isinstance(node.ctx, ast.Load)
            ):
                read.add(node.attr)
    assert FIELDS.keys() - read == set()


def test_help_lists_every_key_and_loads_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in FIELDS)
    assert "| torch" not in done.stderr.replace(" ", "").replace("|torch", "| torch")


def test_a_mistyped_key_is_one_line_and_exit_2():
    done = run("train.py", "--cfg", "configs/ss_cil.yaml", "lora_rnk=8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "lora_rank" in done.stderr
