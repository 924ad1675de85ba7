"""Train a classifier by Machine vs Machine and report its robustness.

    python scripts/train_minimax.py                                     # digits, Minimax
    python scripts/train_minimax.py --defence alt                       # plain descent and ascent
    python scripts/train_minimax.py --defence sens                      # penalty on the slope
    python scripts/train_minimax.py --defence mixture                   # the worst of several
    python scripts/train_minimax.py --gap-steps 100                     # watch the duality gap
    python scripts/train_minimax.py --dataset mnist --data-dir D        # the paper's CNN and ε
    python scripts/train_minimax.py --resume runs/NAME                  # go on after a kill

The report has columns that no attack of the game itself can flatter: `learned:attnet-curr`, an
AttNet trained from scratch on the finished classifier (best of --restarts, chosen on the
validation split), and L2L's attacker likewise. A run leaves them, and the game's own, as files.

It is about the last weights, the end of the game, not those that PGD-10 on the validation split
would choose: where nothing is robust, that is a point near the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from typing_extensions import override

from advgame.choices import Per
from advgame.errors import InputError
from advgame.run.defender_job import DefenderJob, ball, tested
from advgame.run.folder import RunFolder
from advgame.run.job import about
from advgame.run.options import Count, Positive, Share, Whole
from advgame.run.selection import Criterion
from advgame.run.settings import RunConfig, paper_recipes
from agents.settings import Bound

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from advgame import solvers
    from advgame.attacks import Attack
    from advgame.data import ImageSet, Splits
    from advgame.games.training import DefenderTraining, Rules
    from advgame.run.curves import Panels
    from advgame.run.loop import Validate
    from advgame.threat import Threat
    from agents.attacker_network import NetworkAttack
    from agents.attnet import AttNet
    from agents.best_response import AttackerClass, BestResponse

OneNetwork = Literal["alt", "minimax", "maximin", "unrolled", "extragradient", "optimistic"]
Defence = Literal["plain", "lwa", "sens", "pgd", OneNetwork, "mixture"]
Responder = Literal["attnet", "l2l"]


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier by Machine vs Machine and report its robustness.

    The defaults shown are those of the --dataset on the same command line.
    """

    model: str = "minimax_cnn"
    """small_cnn, minimax_cnn, lean_resnet, resnet18, preact_resnet18, wrn-DEPTH-WIDEN, e.g.
    wrn-34-10, or your own: package.module:factory(1, width=8), which returns an nn.Module for
    images in [0, 1]"""
    lr: Positive = 1e-3
    """of Adam on the defender (the paper: 1e-4, for many more steps)"""
    weight_decay: Share = 0.0
    """weight decay of the defender"""
    schedule: Literal["onecycle", "multistep", "constant"] = "constant"
    """learning-rate schedule, per step"""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "32-true"
    """gradients of gradients need it"""
    defence: Defence = "minimax"
    """lwa, sens: FGSM; pgd: PGD-10; mixture: --mixture; alt to optimistic: AttNet, by a solver"""
    gamma: float = 1.0
    """minimax and maximin: γ of the sensitivity penalty"""
    penalty: float = 0.5
    """sens: weight of the input's slope over ε; 0.5 is the paper's γ = ηN"""
    ascent_steps: Count = 1
    """of the attacker per step of the defender"""
    unroll: Count = 1
    """unrolled: ascents that the defender sees through"""
    look_ahead_lr: Positive = 0.5
    """unrolled, extragradient: rate of the attacker's imagined plain steps; 0.5 goes with γ = 1"""
    attacker_lr: Positive = 3e-3
    """of Adam on the game's AttNet (the paper: 1e-3, ten times the defender's); fresh ones: 1e-3"""
    hidden: int = 300
    """width of AttNet's three hidden layers"""
    dropout: float = 0.5
    """of AttNet, while it learns"""
    bound: Bound = "tanh"
    """how AttNet stays in the ball: tanh or clip"""
    output_scale: float = 2.0
    """root mean square of AttNet's outputs in front of the bound; 0: as they are, tanh saturates"""
    centre: bool = True
    """AttNet sees each image less its own mean; otherwise pixels in [-1, 1], to the letter"""
    mixture: tuple[str, ...] = ("fgsm", "pgd", "attnet")
    """mixture: fgsm, ifgsm, pgd, and networks named attnet, attnet2, ..."""
    per: Per = "sample"
    """mixture: the worst attack of each sample, or of the batch"""
    judged: Literal["last", "best"] = "last"
    """weights that the report is about: the game's end, or the best on validation, see --select"""
    responders: tuple[Responder, ...] = ("attnet",)
    """attackers trained from scratch on the finished classifier"""
    response_steps: Whole = 3000
    """of each of them; 0 trains none (the paper: 30,000)"""
    restarts: Count = 2
    """fresh networks of each, of which the strongest counts; and fresh defenders"""
    gap_steps: Whole = 0
    """of the best responses that estimate the duality gap at each validation; 0 looks for none"""


# what a data set changes in Config: pixels of the paper lie in [-1, 1], its η is 2ε
RECIPES = paper_recipes(
    mnist={"eps": "0.15", "epochs": 10, "batch_size": 128, "eval_n": 1000},
    cifar10={"eps": "0.05", "epochs": 30, "batch_size": 128, "eval_n": 1000},
)


def direction(config: Config) -> solvers.Direction:
    """How both players step, by the name of the defence."""
    from advgame import solvers

    made: dict[str, Callable[[], solvers.Direction]] = {
        "alt": lambda: solvers.simultaneous,
        "minimax": lambda: solvers.sensitivity(config.gamma),
        "maximin": lambda: solvers.maximin(solvers.sensitivity(config.gamma)),
        "unrolled": lambda: solvers.unrolled(config.unroll, config.look_ahead_lr),
        "extragradient": lambda: solvers.extragradient(config.lr, config.look_ahead_lr),
        "optimistic": solvers.Optimistic,
    }
    return made[config.defence]()


def played(config: Config, shape: tuple[int, int, int], classes: int, device: Any) -> Rules:
    """The rules of the game: the defence, and the attacks that it trains against."""
    from advgame.games.adversarial_training import AdversarialTraining
    from advgame.games.minimax import Minimax, SensitivityTraining
    from advgame.games.mixture import FIXED, Mixture
    from advgame.seeding import seeded_init
    from agents.attacker_network import AttackerPlayer

    threat = ball(config)

    def network(name: str) -> AttNet:
        with seeded_init(config.seed, name):
            return fresh(config, shape, classes).to(device)

    if config.defence == "plain":
        return AdversarialTraining(threat)
    if config.defence in ("lwa", "sens"):
        return SensitivityTraining(threat, config.penalty if config.defence == "sens" else 0.0)
    if config.defence == "pgd":
        return AdversarialTraining(threat, FIXED["pgd"])
    if config.defence == "mixture":
        fixed = [name for name in config.mixture if name in FIXED]
        learned = {name: network(name) for name in config.mixture if name not in FIXED}
        lr, steps = config.attacker_lr, config.ascent_steps
        return Mixture(threat, fixed, learned, lr=lr, per=config.per, ascent_steps=steps)
    player = AttackerPlayer(network("attacker"), lr=config.attacker_lr)
    return Minimax(threat, player, direction(config), config.ascent_steps)


def fresh(config: Config, shape: tuple[int, int, int], classes: int) -> AttNet:
    """A new AttNet, of the settings' sizes and bounds."""
    from agents.attnet import AttNet

    made = config.hidden, config.dropout, config.bound, config.output_scale, config.centre
    return AttNet(shape, classes, *made)


def classes(config: Config, data: Splits) -> dict[Responder, AttackerClass]:
    """The attacker classes by name of which fresh networks respond to the classifier."""
    from agents.l2l import L2LNetwork

    shape, labels = data.train.shape, data.train.classes
    return {"attnet": lambda: fresh(config, shape, labels), "l2l": lambda: L2LNetwork(shape)}


class Job(DefenderJob[Config, "DefenderTraining"]):
    """The job that trains a classifier by Machine vs Machine and judges it."""

    config = Config
    recipes = RECIPES
    algorithm = "adam"
    uncounted = "the passes of its responses are not counted; go by --epochs"
    linf_only = (
        "its networks perturb each pixel by up to ε, and its penalty goes with FGSM's sign; "
        "train.py and train_cat_and_mouse.py play in L2"
    )

    @override
    def title(self, config: Config) -> str:
        return f"Machine vs Machine, {config.defence},"

    @override
    def panels(self) -> Panels:
        from advgame.games.minimax import PANELS

        return PANELS

    def purpose(self, config: Config) -> Criterion:
        """Plain training is for clean images."""
        return "clean" if config.defence == "plain" else "robust"

    @override
    def check(self, config: Config) -> Config:
        from advgame.games.mixture import check_mixture

        config = super().check(config)
        if config.processes > 1 or config.precision != "32-true":
            raise InputError("these solvers: one device only, full precision only")
        if config.grad_clip is not None and config.defence not in ("plain", "lwa", "sens", "pgd"):
            raise InputError("solvers take their own steps: --grad-clip is not for them")
        if config.gap_steps and config.defence not in get_args(OneNetwork):
            raise InputError(f"--gap-steps needs one attacker network: {config.defence} has none")
        if config.gap_steps and config.ema is not None:
            raise InputError(
                "--gap-steps is about the defender that played, --ema about its average"
            )
        check_mixture(config.mixture)
        played(config, (1, 2, 2), 2, "cpu")  # these refuse what is left
        fresh(config, (1, 2, 2), 2)
        return config

    @override
    def idle(self, config: Config) -> dict[str, tuple[str, ...]]:
        from advgame.games.mixture import FIXED

        whose: dict[str, tuple[Defence, ...]] = {
            "gamma": ("minimax", "maximin"),
            "penalty": ("sens",),
            "unroll": ("unrolled",),
            "look_ahead_lr": ("unrolled", "extragradient"),
            "ascent_steps": (*get_args(OneNetwork), "mixture"),
            "attacker_lr": (*get_args(OneNetwork), "mixture"),
            "mixture": ("mixture",),
            "per": ("mixture",),
        }
        learned = config.defence in get_args(OneNetwork)
        if config.defence == "mixture":
            learned = any(name not in FIXED for name in config.mixture)
        responds = bool(config.response_steps) and "attnet" in config.responders
        others = [name for name, users in whose.items() if config.defence not in users]
        if config.defence == "plain":
            others.append("eps_ramp")
        found = {f"--defence {config.defence}": tuple(others)}
        if not config.response_steps:
            found["--response-steps 0"] = ("responders", "restarts")
        if config.defence == "mixture" and not learned:
            found["a mixture without networks"] = ("ascent_steps", "attacker_lr")
        if not learned and not responds:
            sizes = ("hidden", "dropout", "bound", "output_scale", "centre")
            found["a run without an AttNet"] = sizes
        return found

    @override
    def rules(self, config: Config, data: ImageSet, fabric: Fabric) -> Rules:
        return played(config, data.shape, data.classes, fabric.device)

    def own_attacker(self, game: DefenderTraining, threat: Threat) -> NetworkAttack | None:
        """What the network does to the validation split."""
        from agents.attacker_network import network_of

        network = network_of(game.rules)
        return None if network is None else network.attack(threat)

    def watch(
        self, config: Config, game: DefenderTraining, data: Splits, threat: Threat
    ) -> Validate:
        """The duality gap on the validation split, where --gap-steps asks for it."""
        from advgame.seeding import derive_seed
        from agents.best_response import Effort
        from agents.exploitability import duality_gap

        def gap(module: nn.Module) -> dict[str, float]:
            attack = self.own_attacker(game, threat)
            if not config.gap_steps or attack is None:
                return {}
            made, seed = classes(config, data)["attnet"], derive_seed(config.seed, "gap")
            attacker = Effort(config.gap_steps, 1)
            defender = Effort(config.gap_steps, 1, lr=config.lr)
            return duality_gap(
                module,
                attack,
                made,
                data.train,
                data.validation,
                attacker,
                defender,
                seed=seed,
            )

        return gap

    def judging(
        self, config: Config, run: RunFolder, game: DefenderTraining, data: Splits, threat: Threat
    ) -> Mapping[str, Any]:
        """Fresh attackers and the game's end; the game's own attacker becomes a file."""
        from advgame.health import network_signs
        from advgame.seeding import derive_seed
        from agents.attacker_file import NAME
        from agents.best_response import Effort, Kept, best_response
        from agents.exploitability import best_defences, exploitability

        told, test = about(config), tested(config, data)
        if own := self.own_attacker(game, threat):
            own.network.save(run.path / NAME, told)
        seed, players = derive_seed(config.seed, "response"), classes(config, data)
        found: dict[str, BestResponse] = {}

        def respond(module: nn.Module) -> dict[str, Attack]:
            responses: dict[str, Attack] = {}
            for responder in config.responders if config.response_steps else ():
                effort, its = Effort(config.response_steps, config.restarts), players[responder]
                name = f"{responder}-curr"
                found[responder] = best_response(
                    module, data.train, data.validation, threat, effort,
                    seed=seed, attackers=its, keep=Kept(run.path, name, told),
                )  # fmt: skip
                responses[f"learned:{name}"] = found[responder].network.attack(threat)
            return responses

        def measure(module: nn.Module) -> dict[str, Any]:
            attnet = found.get("attnet")
            shown = {"own": own and own.network, "curr": attnet and attnet.network}
            x, y = data.validation.floats(), data.validation.labels
            life = {name: network_signs(one, x, y) for name, one in shown.items() if one}
            measured: dict[str, Any] = {"life": life}
            # u as v has met it: no average, no earlier one
            if own is None or config.judged == "best" or config.ema or attnet is None:
                return measured
            attnets = [one.attack(threat) for one in attnet.networks]
            effort = Effort(config.response_steps, config.restarts, lr=config.lr)
            held_out = data.validation
            defences = best_defences(module, own, data.train, held_out, effort, seed=seed)
            measured["game"] = exploitability(
                module, own, attnets, defences, threat, held_out, test, seed=seed
            )
            return measured

        return {"respond": respond, "measure": measure, "which": config.judged}


job = Job()

if __name__ == "__main__":
    job.main()
