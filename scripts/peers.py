"""Other libraries' attacks, to be measured beside ours; none of them is a requirement."""

from __future__ import annotations

from timing import Play
from torch import Tensor, nn


def peer(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Play:
    """PGD of step size ε/4 from a random start, by another library and in its own manner.

    Args:
        name: torchattacks, foolbox or adversarial-robustness-toolbox.
        model: in evaluation mode, of 10 classes.
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        eps: radius.
        steps: of the attack.

    Returns:
        a call without arguments that attacks; raises ImportError where the library is missing.
    """
    if name == "torchattacks":
        from torchattacks import PGD

        madry = PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=True)
        return lambda: madry(x, y)
    if name == "foolbox":
        from foolbox.attacks import LinfPGD
        from foolbox.models.pytorch import PyTorchModel

        wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
        linf_pgd = LinfPGD(abs_stepsize=eps / 4, steps=steps, random_start=True)
        return lambda: linf_pgd.run(wrapped, x, y, epsilon=eps)
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model.register_forward_hook(lambda *call: call[2].float())  # NumPy knows no bf16
    about = {"input_shape": x.shape[1:], "nb_classes": 10, "clip_values": (0.0, 1.0)}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), **about)
    settings = {"max_iter": steps, "num_random_init": 1, "batch_size": len(x), "verbose": False}
    art = ProjectedGradientDescentPyTorch(classifier, eps=eps, eps_step=eps / 4, **settings)
    images, labels = x.cpu().numpy(), y.cpu().numpy()  # ART takes and gives NumPy
    return lambda: art.generate(images, labels)
