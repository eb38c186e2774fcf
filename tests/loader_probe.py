"""Started by test_resnet_main.py on one and on four processes: what an epoch is made of.

Prints, for each global batch, the indices and a digest of the images that all processes together
trained on.
"""

import hashlib
import sys

import torch

import image_data
import runtime

accelerator = runtime.build_accelerator()
with accelerator.local_main_process_first():
    data = image_data.load(sys.argv[1], 32, seed=5, workers=1, download=False)
loader = image_data.ImageLoader(
    accelerator, data.train, batch_size=12, image_size=32, seed=5, train=True, workers=1
)
for batch in loader.epoch(2):
    gathered = (batch.indices.to(accelerator.device), batch.weights, batch.images.contiguous())
    indices, weights, images = accelerator.gather(gathered)
    real = weights.bool()
    digest = hashlib.sha256(images[real].numpy().tobytes()).hexdigest()
    accelerator.print(indices[real].tolist(), digest)
accelerator.print(accelerator.num_processes, "processes", torch.get_num_threads(), "threads")
accelerator.end_training()
