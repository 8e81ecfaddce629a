"""The program of one user of the soaked fabric, run by `python -c`: a client of its own process.

It is text, because `zfabric.testing` stands below the client and must not import it.

Arguments: address, directory, name, seed. It writes a JSON line per piece of work that is over:
{"began", "ended": seconds on the monotonic clock, "lost", "wrong", "twice", "hung": how many,
"ids": results it took, "why": text or null}. Stdin: "stop", answered by {"stopped": true}; then
"empty", answered by {"empty": bool, "info": the broker's}; the end of stdin ends it.
"""

PROGRAM = r'''
import json, os, random, sys, threading, time
from collections import Counter
import zfabric
from zfabric.errors import TaskCancelled

ADDRESS, DIRECTORY, NAME, SEED = sys.argv[1:]
PATIENCE_S = 60.0
HELD = ("waiting", "ready", "running", "finished", "failed", "released")


def note(directory, name):
    audit = os.open(directory + "/audit", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(audit, f"{name} {os.getpid()}\n".encode())
    os.close(audit)


def piece(directory, name, value, before=0, pause_s=0.002):
    note(directory, name)
    time.sleep(pause_s)
    return value + before


def block(directory, name, n):
    note(directory, name)
    return bytes(n)


def length(directory, name, data):
    note(directory, name)
    return len(data)


def hold(directory, name, lock, dies):
    note(directory, name)
    with zfabric.Lock(lock):
        if dies:
            try:
                os.close(os.open(f"{directory}/{name}.died", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return name
            os._exit(3)
        return name


class Work:
    """One piece: futures with the values that they must have."""

    def __init__(self, client, number, rng):
        self.client, self.rng, self.prefix = client, rng, f"{NAME}.{number}"
        self.due, self.may_be_cancelled, self.calls = [], False, Counter()

    def add(self, want, fn, *args):
        name = f"{self.prefix}.{len(self.due)}"
        future = self.client.submit(fn, DIRECTORY, name, *args)
        future.add_done_callback(lambda _: self.calls.update([name]))
        self.due.append((name, future, want))
        return future

    def many(self):
        for i in range(self.rng.randrange(1, 60)):
            self.add(i, piece, i)

    def chain(self):
        last = 0
        for i in range(self.rng.randrange(2, 12)):
            last = self.add(i + 1, piece, 1, last)

    def large(self):
        n = self.rng.randrange(1, 2_000_000)
        self.add(n, length, self.client.submit(block, DIRECTORY, f"{self.prefix}.block", n))

    def locks(self):
        for i in range(4):
            self.add(f"{self.prefix}.{i}", hold, self.prefix, i == 0)

    def cancel(self):
        self.may_be_cancelled = True
        for i in range(6):
            self.add(i, piece, i, 0, 0.2)
        time.sleep(0.05)
        self.client.cancel([future for _, future, _ in self.due[self.rng.randrange(6):]])

    def outcome(self):
        found = {"lost": 0, "wrong": 0, "twice": 0, "hung": 0, "ids": [], "why": None}
        deadline = time.monotonic() + PATIENCE_S
        for name, future, want in self.due:
            try:
                got = future.result(max(0.1, deadline - time.monotonic()))
            except TimeoutError:
                kind, why = "hung", f"{name} has no result after {PATIENCE_S} s"
            except TaskCancelled as exc:
                if self.may_be_cancelled:
                    continue
                kind, why = "lost", f"{name}: {exc!r}"
            except Exception as exc:
                kind, why = "lost", f"{name}: {exc!r}"
            else:
                found["ids"].append(name)
                if got == want:
                    continue
                kind, why = "wrong", f"{name} is {got!r} and not {want!r}"
            found[kind] += 1
            found["why"] = why
        found["twice"] = sum(1 for n in self.calls.values() if n > 1)
        return found


def say(line):
    print(json.dumps(line), flush=True)


def is_empty(info):
    return not any(info["tasks"][name] for name in HELD) and not any(
        worker["values"] for worker in info["workers"]
    )


stop = threading.Event()
asked = threading.Event()


def listen():
    sys.stdin.readline()
    stop.set()
    sys.stdin.readline()
    asked.set()


threading.Thread(target=listen, daemon=True).start()
with zfabric.Client(ADDRESS) as client:
    client.wait_for_workers(3, timeout=30)
    rng, number = random.Random(SEED), 0
    while not stop.is_set():
        number += 1
        kind = rng.choice(["many", "chain", "large", "locks", "cancel"])
        began = time.monotonic()
        work = Work(client, number, rng)
        getattr(work, kind)()
        say({"kind": kind, "began": began, **work.outcome(), "ended": time.monotonic()})
        del work
    say({"stopped": True})
    asked.wait()
    deadline = time.monotonic() + 20.0
    while not is_empty(info := client.info()) and time.monotonic() < deadline:
        time.sleep(0.05)
    say({"empty": is_empty(info), "info": repr(info)})
'''
