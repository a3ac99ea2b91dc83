"""microRTS, a small real-time strategy game, as a Gymnasium environment on its Java game state.

microRTS (Ontañón 2013, "The combinatorial multi-armed bandit problem and its application to real-time strategy games") comes in
the package gym-microrts, which is GPL-3 and pins a gym that can no longer be built: it is installed by hand, with
``pip install --no-deps gym-microrts==0.4.3 JPype1``, beside a Java runtime.

Both sides own a base and a worker and fight for resources. Where one order per idle unit would be an action of its own, here
a *decision* is the order for one idle unit: the game runs on until a unit of the agent has a choice to make.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_qa.errors import QAError

__all__ = ["MicroRTS", "check_installed"]

TYPES = ["Resource", "Base", "Barracks", "Worker", "Light", "Heavy", "Ranged"]
BASE, WORKER = TYPES.index("Base"), TYPES.index("Worker")
ARMY = slice(WORKER, None)  # what moves
WAIT, PRODUCE, ATTACK = 0, 4, 5  # kinds of orders in Java; 1 to 3 are move, harvest and return
REACH = 3  # cells that an attack reaches at most
FIRST_PRODUCE, FIRST_ATTACK = 13, 37
N_ACTIONS = FIRST_ATTACK + (2 * REACH + 1) ** 2
N_PLANES = 13  # hit points, resources, mine, the enemy's, seven types, busy, the unit that is to be ordered
IDLE_CYCLES = 10  # of a unit that waits
PLANS = {  # of the players of ai.abstraction, with what each is about
    "Move": ["x", "y"],
    "Train": ["type"],
    "Build": ["type", "x", "y"],
    "Harvest": ["target", "base"],
    "Attack": ["target"],
    "Idle": [],
}

Info = dict[str, Any]
_starting = threading.Lock()


def check_installed() -> Path:
    """The folder of the game.

    :raises QAError: when the game or the bridge to Java is not installed
    """
    found = [importlib.util.find_spec(name) for name in ("gym_microrts", "jpype")]
    if found[0] is None or found[1] is None or found[0].origin is None:
        raise QAError(
            "microRTS is not installed; expected the packages gym_microrts (GPL-3) and jpype, and a Java runtime; "
            "pip install --no-deps gym-microrts==0.4.3 JPype1"
        )
    return Path(found[0].origin).parent / "microrts"


def _java(name: str) -> Any:
    """A Java class; the first starts Java, once a process."""
    import jpype

    with _starting:
        if not jpype.isJVMStarted():
            _import_pygame()
            jars = sorted(check_installed().glob("*.jar"), key=lambda jar: (jar.name != "microrts.jar", jar.name))
            jpype.startJVM(  # the game's own jar first: those of its players carry older classes of the same names
                "-Xmx512m",
                "-XX:+UseSerialGC",
                "-Djava.awt.headless=true",
                classpath=[str(jar) for jar in jars],
                convertStrings=False,
            )
    return jpype.JClass(name)


def _import_pygame() -> None:
    """Where it is installed, before Java starts: on import it puts the handlers of signals back without the arguments that Java's
    need (by ``signal`` in place of ``sigaction``), and Java dies of the first null pointer that it could have handled.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with contextlib.suppress(ImportError):
        importlib.import_module("pygame")


def _player_in(game: Any, player: Any) -> Any:
    """A player who goes on with the same plans in a clone of the game.

    Java's ``clone`` gives a player without plans, and what is planned is about units of the game that was cloned.
    """
    other = player.clone()
    if not isinstance(player, _java("ai.abstraction.AbstractionLayerAI")):
        return other

    def there(value: Any) -> Any:  # a unit that is no more has nobody there, and its plans are dropped
        return (game.getUnit(value.getID()) or value) if isinstance(value, _java("rts.units.Unit")) else value

    for plan in _field("ai.abstraction.AbstractionLayerAI", "actions").get(player).values():
        name = str(plan.getClass().getSimpleName())
        values = [_field(f"ai.abstraction.{name}", field).get(plan) for field in PLANS[name]]
        getattr(other, name.lower())(there(plan.getUnit()), *map(there, values))
        if name == "Train":
            done = _field("ai.abstraction.Train", "completed")
            done.set(other.getAbstractAction(there(plan.getUnit())), done.get(plan))
    return other


@functools.cache
def _field(name: str, field: str) -> Any:
    """A field of a Java class that is not public."""
    found = _java(name).class_.getDeclaredField(field)
    found.setAccessible(True)
    return found


def _count(there: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many units of each type both sides have on the map, (2, n_types)."""
    _, _, owner, kind, _ = there
    placed = (owner * (len(TYPES) + 1) + kind).ravel()
    return np.bincount(placed, minlength=3 * (len(TYPES) + 1)).reshape(3, -1)[1:, 1:]


class MicroRTS(gym.Env[NDArray[np.float32], np.int64]):
    """The agent plays the blue side. ``action_masks()`` tells which orders the unit that is asked can carry out; any other waits.

    Actions: 0 wait; 1 to 12 move, harvest, return, each up, right, down, left; 13 to 36 produce, four directions times six
    types; 37 to 85 attack a cell of the 7 x 7 around the unit. Observations (13 * height * width + 3): planes of the map, then
    both sides' resources and the time. The reward is a tenth of how the balance of material changes, and ten for the game.

    ``info`` tells on every step and at reset: ``own_workers``, ``enemy_workers``, ``own_units``, ``enemy_units`` (that move),
    ``own_resources``, ``enemy_resources``, ``own_base``, ``enemy_base`` (whether there is one), ``own_base_hp`` (hit points),
    ``threatened`` (an enemy within 2 cells of an own base), ``busy`` (own units under order), ``asked`` (the type of the unit to be
    ordered), ``time``, ``lost``, ``killed`` (units in this step), ``lost_base``, ``won``, ``defeated``.

    The game is deterministic but for the seeded moment at which it begins for the agent.

    :param opponent: a Java class that plays, e.g. "ai.abstraction.WorkerRush"; those of "ai.abstraction" are cloned with their plans
    :param board: a map in the game's folder
    :param max_cycles: after which the game is cut
    :param latest_start: the opponent is ahead by a random number of cycles up to this
    """

    def __init__(
        self,
        opponent: str = "ai.abstraction.WorkerRush",
        board: str = "maps/8x8/basesWorkers8x8A.xml",
        max_cycles: int = 2000,
        latest_start: int = 20,
    ) -> None:
        folder = check_installed()
        if not (folder / board).is_file():
            raise QAError(
                f"MicroRTS got board={board!r}; expected a file in {folder}; give e.g. maps/8x8/basesWorkers8x8A.xml"
            )
        self._units = _java("rts.units.UnitTypeTable")()
        try:
            self._opponent = _java(opponent)(self._units)
        except TypeError as error:  # JPype's, of a class that is not there or takes no table of units
            raise QAError(
                f"MicroRTS got opponent={opponent!r}; expected a Java class that plays ({error}); see its src/ai"
            ) from error
        self._board = _java("rts.PhysicalGameState").load(str(folder / board), self._units)
        types = [self._units.getUnitType(name) for name in TYPES]
        self._cost, self._health = np.array([(int(each.cost), int(each.hp)) for each in types]).T
        self._GameState, self._PlayerAction = _java("rts.GameState"), _java("rts.PlayerAction")
        self.max_cycles, self.latest_start = max_cycles, latest_start
        self.shape = (int(self._board.getHeight()), int(self._board.getWidth()))
        self.observation_space = spaces.Box(0.0, 1.0, (N_PLANES * self.shape[0] * self.shape[1] + 3,), np.float32)
        self.action_space = spaces.Discrete(N_ACTIONS)
        self._game: Any = None
        self._unit: Any = None
        self._orders: dict[int, Any] = {}
        self._passed: set[int] = set()
        """Units that have been asked in this cycle."""

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[NDArray[np.float32], Info]:
        super().reset(seed=seed)
        self._game = self._GameState(self._board.clone(), self._units)
        self._opponent.reset()
        self._passed = set()
        for _ in range(int(self.np_random.integers(self.latest_start + 1))):
            self._cycle()
        self._next_unit()
        there = self._look()
        self._balance, self._counts = self._material(there), _count(there)
        return self._observe(there), self._tell(there, 0, 0, False, None)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which orders the unit that is asked can carry out, (n_actions,)."""
        masks = np.zeros(N_ACTIONS, np.bool_)
        masks[list(self._orders) or [WAIT]] = True
        return masks

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        order = self._orders.get(int(action), self._orders[WAIT])
        orders = self._PlayerAction()
        orders.addUnitAction(self._unit, order)
        self._game.issueSafe(orders)
        self._passed.add(int(self._unit.getID()))
        goes_on = self._next_unit()
        terminated = bool(self._game.gameover())
        winner = int(self._game.winner()) if terminated else None
        there = self._look()
        before, self._counts = self._counts, _count(there)
        balance = self._material(there)
        reward = 0.1 * (balance - self._balance) + {0: 10.0, 1: -10.0}.get(-1 if winner is None else winner, 0.0)
        self._balance = balance
        gone = np.maximum(before - self._counts, 0)
        lost, killed = gone[:, ARMY].sum(axis=1).tolist()
        info = self._tell(there, lost, killed, bool(gone[0, BASE]), winner)
        return self._observe(there), reward, terminated, not (goes_on or terminated), info

    def clone(self) -> MicroRTS:
        """The same game once more, which can be stepped by itself."""
        other: MicroRTS = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._game = self._game.clone()
        other._opponent = _player_in(other._game, self._opponent)
        other._passed = set(self._passed)
        if self._np_random is not None:
            other._np_random = np.random.Generator(type(self._np_random.bit_generator)())
            other._np_random.bit_generator.state = self._np_random.bit_generator.state
        if self._unit is not None:
            other._unit = other._game.getUnit(self._unit.getID())
            other._orders = other._possible(other._unit)
        return other

    def _next_unit(self) -> bool:
        """Run on until a unit has a choice to make; False when the game is over, or out of time."""
        while True:
            for unit in self._listed():
                if unit.getPlayer() == 0 and int(unit.getID()) not in self._passed:
                    if self._game.getActionAssignment(unit) is not None:
                        continue
                    orders = self._possible(unit)
                    if len(orders) > 1:
                        self._unit, self._orders = unit, orders
                        return True
                    self._passed.add(int(unit.getID()))
            if not self._cycle():
                self._unit, self._orders = None, {}
                return False

    def _cycle(self) -> bool:
        self._game.issueSafe(self._opponent.getAction(1, self._game))
        over = bool(self._game.cycle())
        self._passed = set()
        return not over and int(self._game.getTime()) < self.max_cycles

    def _listed(self) -> list[Any]:
        """All units, fetched at once: walking along Java's list takes twice as long."""
        return list(self._game.getUnits().toArray())

    def _possible(self, unit: Any) -> dict[int, Any]:
        """Orders by the number of the action."""
        return {
            self._number(order, unit): order
            for order in unit.getUnitActions(self._game, IDLE_CYCLES)
            if order.getType() == WAIT or self._game.isUnitActionAllowed(unit, order)
        }

    @staticmethod
    def _number(order: Any, unit: Any) -> int:
        kind = int(order.getType())
        if kind == WAIT:
            return WAIT
        if kind == ATTACK:
            dx, dy = (int(order.getLocationX() - unit.getX()), int(order.getLocationY() - unit.getY()))
            return FIRST_ATTACK + (dy + REACH) * (2 * REACH + 1) + dx + REACH
        direction = int(order.getDirection())
        if kind == PRODUCE:
            return FIRST_PRODUCE + direction * 6 + TYPES.index(str(order.getUnitType().name)) - 1
        return 1 + (kind - 1) * 4 + direction

    def _look(self) -> NDArray[np.int64]:
        """The map as the game gives it at once, (5, height, width): hit points, what is carried, whose, type plus one, order."""
        return np.array(self._game.getMatrixObservation(0), np.int64)

    def _material(self, there: NDArray[np.int64]) -> float:
        """What the own units, and half of what is carried and stored, cost, minus the enemy's."""
        points, carried, owner, kind, _ = there
        # where nobody stands the points are 0, whatever type is looked up
        worth = self._cost[kind - 1] * points / self._health[kind - 1] + 0.5 * carried
        own, enemy = ((worth * (owner == player + 1)).sum() + 0.5 * self._stored(player) for player in (0, 1))
        return float(own - enemy)

    def _stored(self, player: int) -> int:
        return int(self._game.getPlayer(player).getResources())

    def _tell(self, there: NDArray[np.int64], lost: int, killed: int, lost_base: bool, winner: int | None) -> Info:
        points, _, owner, kind, _ = there
        told = Info()
        for player, side in enumerate(("own", "enemy")):
            counts = self._counts[player].tolist()
            told[f"{side}_workers"] = counts[WORKER]
            told[f"{side}_units"] = sum(counts[ARMY])
            told[f"{side}_resources"] = self._stored(player)
            told[f"{side}_base"] = counts[BASE] > 0
        bases = (owner == 1) & (kind == BASE + 1)
        enemies = np.argwhere((owner == 2) & (kind > WORKER))
        apart = np.abs(np.argwhere(bases)[:, None] - enemies).sum(axis=2)
        told["own_base_hp"] = int(points[bases].sum())
        told["threatened"] = bool((apart <= 2).any())
        own = [unit for unit in self._listed() if unit.getPlayer() == 0]
        told["busy"] = sum(self._game.getActionAssignment(unit) is not None for unit in own)
        told["asked"] = "none" if self._unit is None else str(self._unit.getType().name).lower()
        told |= {"time": int(self._game.getTime()), "lost": lost, "killed": killed, "lost_base": lost_base}
        return told | {"won": winner == 0, "defeated": winner == 1}

    def _observe(self, there: NDArray[np.int64]) -> NDArray[np.float32]:
        points, carried, player, kind, order = there
        planes = np.zeros((N_PLANES, *self.shape), np.float32)
        planes[0], planes[1] = np.minimum(points, 10) / 10, np.minimum(carried, 10) / 10
        planes[2], planes[3] = player == 1, player == 2
        planes[4:11] = kind == np.arange(1, 8)[:, None, None]
        planes[11] = order > 0
        if self._unit is not None:
            planes[12, self._unit.getY(), self._unit.getX()] = 1
        stored = [min(1.0, self._stored(side) / 20) for side in (0, 1)]
        return np.concatenate(
            [planes.ravel(), [*stored, min(1.0, int(self._game.getTime()) / self.max_cycles)]], dtype=np.float32
        )
