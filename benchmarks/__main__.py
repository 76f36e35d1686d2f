"""``python -m benchmarks`` lists the studies; ``python -m benchmarks.compress_real --help`` explains one."""

from __future__ import annotations

STUDIES = {
    "circuits": "a circuit of a million gates, and the kaleidoscope compiler, on the clock",
    "recovery": "what each way to recover a compressed model is worth",
    "compress_real": "trained models compressed at several budgets, beside baselines",
    "convac_depth": "what depth buys: shallow approximations of deep networks, ranks against minimum cuts",
    "convac_geometry": "square against mirror pooling on generated blobs",
    "convac_missing": "a generative network on MNIST under missing pixels",
    "convac_mnist": "discriminative networks on MNIST, shallow and deep",
    "convac_rectifier": "ranks of random networks, products against rectifiers",
    "convac_speed": "a training step and inference beside plain PyTorch forms",
    "kronecker_study": "Kronecker networks beside fully connected ones and other families, speed, conversion",
    "fast_algorithms": "fast transforms found from the matrix and by descent, baselines, beside lazylinop",
    "hidden_layer": "one hidden layer of each family at equal parameter counts",
    "hidden_permutation": "a permutation from n / 4 noisy pairs",
    "identify": "what inspect calls members of every family",
    "peers": "products beside scipy, PyTorch's FFT, torch-structured and lazylinop",
    "kernels": "structured layers against dense ones on the clock",
    "end_to_end": "whole models and transformer blocks before and after, prefill and one token",
}


def main() -> None:
    for name, purpose in STUDIES.items():
        print(f"python -m benchmarks.{name:15} {purpose}")


if __name__ == "__main__":
    main()
