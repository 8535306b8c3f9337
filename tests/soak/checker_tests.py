"""The checker finds what is wrong: made-up histories, each with one fault, and the same without it."""

import unittest

from checker import Checker, Line, View, left_over


def machine(*instances):
    """Two GPUs with (GPU, instance id, profile, first memory slice, size, birth) on them."""
    gpus = [{"index": index, "minor": index + 10, "gpu_instances": []} for index in (0, 1)]
    for gpu, gi, profile, start, size, birth in instances:
        cap = gpu * 100 + gi * 9
        gpus[gpu]["gpu_instances"].append(
            {
                "id": gi,
                "profile": profile,
                "placement": {"start": start, "size": size},
                "cap_minor": cap,
                "birth": birth,
                "compute_instances": [{"uuid": f"MIG-{gpu}-{gi}", "cap_minor": cap + 1, "birth": birth + 1}],
            }
        )
    return {"gpus": gpus}


A = (11, 500)
B = (12, 501)
ONE = (0, 1, "1g.10gb", 0, 1, 1)
TWO = (1, 2, "2g.20gb", 2, 2, 3)


def view(holder, uuid="MIG-0-1", asked="1g.10gb", caps=(9, 10), gpus=(10,)):
    return View(holder, (asked,), (uuid,), frozenset(caps), frozenset(gpus))


def found(*looks, foreign=()):
    """What the checker says of (before, machine, after) one after the other."""
    checker = Checker()
    for at, (before, shown, after) in enumerate(looks):
        checker.look(at, before, shown, set(after), set(foreign))
    return checker.violations


class Slices(unittest.TestCase):
    def assert_found(self, violations, *words):
        self.assertEqual(len(violations), 1, violations)
        for word in words:
            self.assertIn(word, violations[0])

    def test_two_with_a_slice_each_are_fine_for_as_long_as_they_like(self):
        both = {A: view("a"), B: view("b", "MIG-1-2", "2g.20gb", (118, 119), (11,))}
        self.assertEqual(found(*[(both, machine(ONE, TWO), [A, B])] * 3), [])

    def test_two_holders_of_a_slice(self):
        violations = found(({A: view("a"), B: view("b")}, machine(ONE), [A, B]))
        self.assertEqual(len(violations), 4, "UUID, memory slice, two capabilities")
        for violation in violations:
            self.assertIn("a (process 11) and b (process 12) both live", violation)

    def test_one_of_them_was_dead_by_then(self):
        self.assertEqual(found(({A: view("a"), B: view("b")}, machine(ONE), [B])), [])

    def test_two_processes_of_one_holder_share_its_slice(self):
        self.assertEqual(found(({A: view("a"), B: view("a")}, machine(ONE), [A, B])), [])

    def test_a_slice_destroyed_below_its_holder(self):
        self.assert_found(found(({A: view("a")}, machine(), [A])), "a (process 11) lives", "MIG-0-1 does not exist")

    def test_a_slice_destroyed_and_made_anew_between_two_looks(self):
        again = (0, 1, "1g.10gb", 0, 1, 7)
        looks = [({A: view("a")}, machine(ONE), [A]), ({A: view("a")}, machine(again), [A])]
        self.assert_found(found(*looks), "made anew")
        self.assertEqual(found(looks[0], ({B: view("b")}, machine(again), [B])), [])

    def test_other_profile_than_asked(self):
        self.assert_found(found(({A: view("a", asked="2g.20gb")}, machine(ONE), [A])), "asked for", "1g.10gb")

    def test_a_node_too_many_and_one_of_another_gpu(self):
        self.assert_found(found(({A: view("a", caps=(9, 10, 118))}, machine(ONE), [A])), "118")
        self.assert_found(found(({A: view("a", gpus=(10, 11))}, machine(ONE), [A])), "11")

    def test_foreign_slices(self):
        self.assertEqual(found(({}, machine(TWO), []), foreign={(1, 2)}), [])
        self.assert_found(found(({}, machine(), []), foreign={(1, 2)}), "was destroyed")
        has_it = {A: view("a", "MIG-1-2", "2g.20gb", (118, 119), (11,))}
        self.assert_found(found((has_it, machine(TWO), [A]), foreign={(1, 2)}), "MIG-1-2, which is foreign")
        anew = (1, 2, "2g.20gb", 2, 2, 9)
        self.assert_found(found(({}, machine(TWO), []), ({}, machine(anew), []), foreign={(1, 2)}), "was changed")


class Waiting(unittest.TestCase):
    def overtaken(self, starts, polls, bound=2):
        """(asked, seen) of each start, the polls at these times with who waits."""
        line = Line(bound)
        for number, (asked, seen) in enumerate(starts):
            line.started(f"b{number}", asked, seen)
        for at, waiting in polls:
            line.poll(at, at, waiting)
        return line.most, len(line.violations)

    def test_an_overtaken_waiter(self):
        polls = [(at, {"a": False}) for at in (10, 20, 30)]
        self.assertEqual(self.overtaken([(11, 12), (13, 14)], polls), (2, 0))
        self.assertEqual(self.overtaken([(11, 12), (13, 14), (21, 22)], polls), (3, 1))

    def test_what_may_have_been_none_does_not_count(self):
        polls = [(10, {"a": False}), (20, {"a": False}), (30, {})]
        self.assertEqual(self.overtaken([(9, 12), (11, 21), (11, 31)], polls, bound=0), (0, 0))

    def test_a_turn_that_is_not_taken_begins_anew_and_forgets_nothing(self):
        polls = [(10, {"a": False}), (20, {"a": False}), (25, {"a": True}), (30, {"a": False}), (40, {"a": False})]
        self.assertEqual(self.overtaken([(11, 12), (22, 27), (31, 32)], polls), (2, 0))


class End(unittest.TestCase):
    def test_leftovers(self):
        self.assertEqual(left_over(machine(), [], [], []), [])
        half = machine(TWO)
        half["gpus"][1]["gpu_instances"][0]["compute_instances"] = []
        self.assertEqual(len(left_over(machine(ONE), ["leases/x.json"], ["mig-hook-x"], ["7 mig-engine"])), 4)
        self.assertEqual(left_over(half, [], [], []), ["GPU 1: GPU instance 2, half made"])


if __name__ == "__main__":
    unittest.main()
