import ast
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT

from atlas.config import (
    FIELDS,
    PATHS,
    Config,
    as_dict,
    load_config,
    rate_of,
    run_name,
    strength_of,
)
from atlas.errors import AtlasError
from atlas.methods import METHODS, Entry

CHECKS = ("load_config", "conflicts")  # what only refuses a value does not use it


def of_text(tmp_path, text, *words):
    """The Config of one YAML file, as text or bytes, and of words of the command line."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config([path], words)


def test_files_overlay_left_to_right_and_the_command_line_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("lora_rank: 2\nlr: 0.5\n")
    (tmp_path / "b.yaml").write_text("lr: 1e-3\nseed: 7\n")
    config = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["seed=8", "base=3", "base=4"])
    assert (config.lora_rank, config.lr, config.seed, config.base) == (2, 1e-3, 8, 4)
    assert config.epochs == Config().epochs


def test_text_is_taken_as_it_stands(tmp_path):
    for text in ("no", "1", "010", "1:30", "2024-01-01", "1e3", "off"):
        assert load_config([], [f"name={text}"]).name == text
        assert of_text(tmp_path, f"name: {text}\n").name == text
    assert load_config([], ["name=null"]).name is None and load_config([], ["name="]).name is None
    assert load_config([], ['name="a,b"']).name == "a,b"
    assert load_config([], ["amp=off"]).amp == of_text(tmp_path, "amp: off").amp == "off"
    config = of_text(tmp_path, "class_order: [no, on, 010]\ndomains: {no: [a, 1], b: [c]}")
    assert config.class_order == ["no", "on", "010"]
    assert config.domains == {"no": ["a", "1"], "b": ["c"]}
    assert load_config([], ["lora_targets=[qk].*,{1,2}"]).lora_targets == "[qk].*,{1,2}"


def test_words_for_true_and_false(tmp_path):
    for word, value in {"no": False, "Off": False, "false": False, "yes": True, "on": True}.items():
        assert of_text(tmp_path, f"synth: {word}").synth is value
        assert load_config([], [f"visual_weights={word}"]).visual_weights is value
    assert load_config([], ["visual_weights=in1k"]).visual_weights == "in1k"


@pytest.mark.parametrize("text", ["1e-4", "1.e-4", "+1E-4", "0.0001", ".0001"])
def test_a_number_is_read_as_a_person_means_it(tmp_path, text):
    assert load_config([], [f"lr={text}"]).lr == of_text(tmp_path, f"lr: {text}").lr == 1e-4
    assert load_config([], [f"lr = {text}"]).lr == 1e-4


def test_what_yaml_itself_writes_is_read_back(tmp_path):
    config = load_config([], ["name=null", "lr=1e22", "class_order=[no, 'a, b']", "amp=off"])
    config = replace(config, name="010", weight_decay=1e-9, domains={"on": ["1", "~"]})
    text = yaml.safe_dump(as_dict(config), sort_keys=False)
    assert of_text(tmp_path, text) == config


def test_every_shipped_config_loads_and_keeps_its_values():
    for path in ROOT.glob("configs/*.yaml"):
        if path.name != "class_map.yaml":
            config = as_dict(load_config([path]))
            for name, value in yaml.safe_load(path.read_text()).items():
                assert config[name] == value
            assert max(map(len, path.read_text().splitlines())) <= 100


@pytest.mark.parametrize(
    "word, what",
    [
        ("lora_rnk=8", "lora_rank"),
        ("lora_rank=eight", "whole number"),
        ("lora_rank=1.5", "whole number"),
        ("lora_rank=true", "whole number"),
        ("lora_rank=-1", "at least 0"),
        ("seed=010", "no leading zero"),
        ("seed=1:30", "whole number"),
        ("seed=1_0", "whole number"),
        ("seed=100000000000000000000", "at most 4294967295"),
        ("seed=4294967296", "at most 4294967295"),
        ("seed=-1", "at least 0"),
        ("epochs=1e9", "whole number"),
        ("base=1000000000", "at most 1000000"),
        ("seed=", "whole number"),
        ("seed=null", "whole number"),
        ("lr=.nan", "a number such as"),
        ("lr=nan", "a number such as"),
        ("lr=inf", "a number such as"),
        ("lr=1e999", "at most"),
        ("lr=00.1", "no leading zero"),
        ("lr=1:30", "a number such as"),
        ("synth=1", "true or false"),
        ("audio=beats", "vggish"),
        ("method=lora", "frozen_lora"),
        ("amp=false", "off"),
        ("heads=3", "multiple of heads=3"),
        ("width=20", "multiple"),
        ("lora_dropout=1.5", "at most"),
        ("warmup=2", "at most 1"),
        ("class_order=a", "list of words"),
        ("class_order=[a", "not readable YAML"),
        ("class_order=[[a]]", "list of words"),
        ("domains={a: b}", "a mapping such as"),
        ("domains={a: {b: [c]}}", "a mapping such as"),
        ("domains={a: [b], a: [c]}", "twice"),
        ("name='a", "not readable YAML"),
        ("name=a/b", "slash"),
        ("name=..", "slash"),
        ("name=" + "é" * 101, "200 bytes"),
        ("data_root=", "must be printable text"),
        ("data_root=a\nb", "must be printable text"),
        ("name=\udcff", "must be printable text"),
        ("data_root=$NO_SUCH_VARIABLE/a", "does not exist"),
        ("data_root=~nosuchuser/a", "does not exist"),
        ("justaword", "key=value"),
        ("=1", "without blanks"),
        ("watch=true", "unknown key"),
    ],
)
def test_bad_values_name_the_key_and_the_way_out(word, what):
    with pytest.raises(AtlasError, match=what):
        load_config([], [word])


@pytest.mark.parametrize(
    "words, what",
    [
        ("dataset=ms3", "protocol=tfcl"),
        ("protocol=tfcl method=finetune classify=true", "classify"),
        ("protocol=tfcl", "lra_trigger=plateau"),
        ("lra_scope=lora lora_rank=0", "lra_scope=trainable"),
        ("lra_space=delta lra_trigger=plateau", "lra_trigger=boundary"),
        ("method=lra_plus lra_scope=lora", "lra_scope=trainable"),
        ("method=lra_plus lra_trigger=plateau protocol=til", "lra_trigger=boundary"),
        ("method=inflora strength=1.5", "at most 1"),
        ("method=lra strength=1", "lra_lambda"),
        ("method=finetune strength=1", "no strength"),
    ],
)
def test_keys_that_cannot_go_together(words, what):
    with pytest.raises(AtlasError, match=what):
        load_config([], words.split())


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_methods_says_what_is_refused(method):
    def refused(*words):
        try:
            load_config([], [f"method={method}", *words])
        except AtlasError as error:
            return str(error)

    entry = METHODS[method]
    assert not refused()
    assert bool(refused("lora_rank=0")) == entry.needs_lora
    assert bool(refused("lra_trigger=plateau")) == entry.needs_boundaries
    assert bool(refused("protocol=tfcl", "lra_trigger=plateau")) == entry.needs_boundaries
    assert bool(refused("first_task=a")) == (not entry.plain_start)
    assert "first_task" in refused("first_task=a", "lra_trigger=plateau") or entry.needs_boundaries
    assert bool(refused("strength=0.5")) == (entry.strength is None)


def test_strength_and_rate_are_the_methods_own_unless_given(monkeypatch):
    assert strength_of(load_config([], ["method=ewc"])) == METHODS["ewc"].strength
    assert strength_of(load_config([], ["method=ewc", "strength=0"])) == 0.0
    assert strength_of(load_config([], ["lra_lambda=3"])) == 3.0
    assert strength_of(load_config([], ["method=finetune"])) == 0.0
    assert rate_of(load_config([], ["lr_first=0.5"])) == 0.5
    assert rate_of(load_config([], ["lr_first=0.5", "lr=0.1"])) == 0.1
    monkeypatch.setitem(METHODS, "ewc", Entry("atlas.methods.ewc:EWC", "", lr=0.3))
    assert rate_of(load_config([], ["method=ewc"])) == 0.3
    assert rate_of(load_config([], ["method=ewc", "lr=0"])) == 0.0


def test_a_key_twice_in_one_file_names_both_lines(tmp_path):
    with pytest.raises(AtlasError, match=r"`seed`.*lines \[1, 3\]"):
        of_text(tmp_path, "seed: 1\nlr: 1e-3\nseed: 2\n")


@pytest.mark.parametrize(
    "text, what",
    [
        ("seed: 1\nepoch: 2\n", "c.yaml; the nearest is `epochs`"),
        ("lr: 1e-3\nseed: 010\n", "c.yaml is `010`"),
        ("- seed\n- 1\n", "key: value"),
        ("seed:1\nlr:2\n", "a blank follows the colon"),
        ("seed: 1 lr: 2\n", "not readable YAML"),
        ("seed:\n\t- 1\n", "not readable YAML"),
        ("seed: *a\n", "not readable YAML"),
        ("seed: 1\n---\nseed: 2\n", "not readable YAML"),
        ("[" * 5000, "not readable YAML"),
        ("a: &x [*x]\n", "not readable YAML"),
        ("class_order: [[a]]\n", "list of words"),
        ("domains: {a: [b], a: [c]}\n", "`a` stands twice"),
        ("? [a]\n: 1\n", "not readable YAML"),
        ("seed: [1]\n", "whole number"),
        ("# é\n".encode("latin-1"), "in UTF-8"),
        (b"seed: 1\x00\n", "not readable YAML"),
        (b"\x89PNG\r\n\x1a\n", "UTF-8"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_error(tmp_path, text, what):
    with pytest.raises(AtlasError, match=what):
        of_text(tmp_path, text)


def test_files_that_are_fine(tmp_path):
    assert of_text(tmp_path, "") == of_text(tmp_path, "# nothing\n") == Config()
    assert of_text(tmp_path, b"\xef\xbb\xbfseed: 3\r\n").seed == 3
    assert of_text(tmp_path, "seed: 3\r\n".encode("utf-16")).seed == 3
    config = of_text(tmp_path, "class_order: &o [a, b]\ndomains: {d: *o}\nseed : 2\n'lr': 1\n")
    assert (config.domains, config.seed, config.lr) == ({"d": ["a", "b"]}, 2, 1.0)


def test_a_file_that_cannot_be_opened_is_one_clear_error(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(AtlasError, match=str(path)):
            load_config([path])
    (tmp_path / "secret.yaml").touch(mode=0o000)
    if not os.access(tmp_path / "secret.yaml", os.R_OK):
        with pytest.raises(AtlasError, match="secret.yaml"):
            load_config([tmp_path / "secret.yaml"])


def test_paths_are_expanded_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DATA", "/data")
    for name in PATHS:
        assert getattr(load_config([], [f"{name}=~/a"]), name) == "/home/someone/a"
        assert getattr(of_text(tmp_path, f"{name}: ${{DATA}}/b"), name) == "/data/b"
    assert load_config([], ["data_root=a/~b"]).data_root == "a/~b"


def test_a_path_may_hold_the_seed(tmp_path):
    config = of_text(tmp_path, "data_root: data/open{seed}\n", "seed=3", "name=r{seed}")
    assert config.data_root == "data/open3" and run_name(config) == "r3"
    assert run_name(load_config([], ["seed=3"])) == "cil_lra_seed3"


def test_every_key_is_read_somewhere():
    """A key that no line reads as config.KEY is a knob that does nothing."""
    read = set()
    for path in [ROOT / "train.py", *ROOT.glob("atlas/**/*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        if path.name == "config.py":
            tree.body = [node for node in tree.body if getattr(node, "name", "") not in CHECKS]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if "config" in (getattr(owner, "id", None), getattr(owner, "attr", None)):
                    read.add(node.attr)
    assert FIELDS.keys() - read == set()


def test_the_keys_need_no_torch():
    program = (
        "import sys, atlas.config, atlas.sweep; "
        "print(*{'torch', 'numpy', 'atlas.report', 'atlas.prepare'} & set(sys.modules))"
    )
    start = time.time()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stdout + done.stderr
    assert time.time() - start < 5  # well under a second on a quiet machine
