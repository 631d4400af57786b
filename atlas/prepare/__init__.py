"""What prepare_data.py calls: synthetic, collected and composed sets, videos, checks."""

from pathlib import Path

from atlas.clips import CSVS


def make_set(dataset, root, **settings):
    """Make a synthetic set, "s4" or "ms3", below `root`; settings: of synth_s4 or synth_ms3."""
    from atlas.prepare.synth import synth_s4
    from atlas.prepare.synth_ms3 import synth_ms3

    {"s4": synth_s4, "ms3": synth_ms3}[dataset](root, **settings)


def make_missing(config):
    """Make the synthetic set of a config with synth: true, where it is not there yet."""
    if config.synth and not Path(config.data_root, CSVS[config.dataset]).is_file():
        print(f"making the synthetic {config.dataset.upper()} in {config.data_root}")
        make_set(config.dataset, config.data_root)
