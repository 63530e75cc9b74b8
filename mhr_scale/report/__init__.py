"""One HTML file about runs: pictures and tables from what lies in their folders, nothing else."""
