"""What prepare_data.py calls: synthetic, collected and composed sets, extraction from videos, checks."""
