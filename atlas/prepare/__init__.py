"""What prepare_data.py calls: synthetic, collected and composed sets, videos, checks."""
