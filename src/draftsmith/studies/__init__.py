"""Studies: grids of runs that answer a question, with the paper's figures beside ours."""
