"""TensorFlow Probability's side of the bench; runs in an environment of its own, without torch.

    python tfp_worker.py FOLDER THREADS

Reads FOLDER/inputs.npz (the arrays of ``bench.problems.Parameters``), writes FOLDER/outputs.npz
(log p(z) and the gradients of its sum for all inputs, named 0, 1, ..) and a JSON line with its
versions; then, for each number n on standard input, makes n calls and writes the seconds they took.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # TensorFlow Probability knows no other
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

tfd = tfp.distributions


@tf.function
def forward_and_backward(inputs):
    """Log p(z) and the gradients of its sum for z, m, s, L, logits."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        z, centers, scale, precision_cholesky, logits = inputs
        eye = tf.eye(z.shape[1], batch_shape=[centers.shape[0]])
        inverse = tf.linalg.triangular_solve(precision_cholesky, eye)
        scale = tf.linalg.band_part(scale, -1, 0)
        covariance = tf.matmul(inverse, inverse, transpose_a=True)
        covariance += tf.matmul(scale, scale, transpose_b=True)
        components = tfd.MultivariateNormalTriL(centers, tf.linalg.cholesky(covariance))
        density = tfd.MixtureSameFamily(tfd.Categorical(logits=logits), components).log_prob(z)
        total = tf.reduce_sum(density)
    return [density, *tape.gradient(total, inputs)]


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    with np.load(folder / "inputs.npz") as arrays:
        names = ("z", "centers", "scale", "precision_cholesky", "logits")
        inputs = [tf.constant(arrays[name]) for name in names]
    outputs = forward_and_backward(inputs)
    np.savez(folder / "outputs.npz", **{str(i): x.numpy() for i, x in enumerate(outputs)})
    versions = {"tensorflow": tf.__version__, "tensorflow_probability": tfp.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            outputs = forward_and_backward(inputs)
        outputs[0].numpy()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
