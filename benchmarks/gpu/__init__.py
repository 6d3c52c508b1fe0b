"""Everything that a GPU alone can tell, in one run of ten minutes.

    make gpu                              builds the CUDA kernels, and runs
    make gpu GPU_PYTHON=python3           the same with an interpreter that has torch already
    python -m benchmarks.gpu --dry-run    every stage on tiny shapes, on the CPU too

Stages in the order of their worth, each a file of this folder:

    ceilings     bandwidth of a copy, an 8192³ product in bf16, the host's time for a launch
    checks       the tests marked `gpu`
    passes       each pass of a step: wall, host and busy time, kernels, by class, share of the peak
    steps        whole steps beside plain AdamW's and beside those of the best known set-up
    operations   each operation by itself, CUDA beside Triton, against a triad
    memory       a snapshot of a step's allocations, and h against an fp32 oracle

A stage has parts. Each part writes its rows to `gpu_STAGE-CARD.csv` as soon as it is through; a
part that has rows of this commit and card is not run again. Nothing is downloaded: models are
random, of the shapes of Llama 3.
"""
