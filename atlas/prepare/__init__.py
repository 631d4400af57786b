"""What prepare_data.py calls: synthetic, collected and composed sets, videos, checks."""

from pathlib import Path

from atlas.clips import CSVS


def make_missing(config):
    """Make the synthetic set of a config with synth: true, where it is not there yet."""
    if config.synth and not Path(config.data_root, CSVS[config.dataset]).is_file():
        from atlas.prepare.synth import make_set

        print(f"making the synthetic {config.dataset.upper()} in {config.data_root}")
        make_set(config.dataset, config.data_root)
