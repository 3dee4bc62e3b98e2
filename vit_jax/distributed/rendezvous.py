"""Rendezvous of a run's processes at a socket of process 0, before jax.distributed starts.

jax.distributed aborts if a process is missing and can't tell which. The rendezvous can; it lasts
until jax.distributed has started in all processes. Its messages (talk.py has their framing):

    i to 0      {"process": i, "host": NAME, "facts": {...}}
    0 to all    {} once all have joined; else {"lost": WHY} or {"mistake": WHY}
    both        {"alive": true} twice a second; {"started": true} once jax.distributed has started;
                {"lost": WHY} from process 0 if a process ends or stops reporting before that

Process 0 serves all connections concurrently. A peer that does not identify itself within PATIENCE
seconds, or sends anything else, is a stranger: it is disconnected, counted, and reported once all
have joined or the time is over. At most STRANGERS more connections than the run has processes wait
unidentified; beyond that the oldest is dropped. A stranger never ends the run; without a secret of
the job, one that imitates a process is not detected. The launchers of launch/ create a secret for
each start.
"""

import collections
import contextlib
import resource
import selectors
import socket
import sys
import threading
import time

from vit_jax.distributed.talk import SEALED, SECRET, Stranger, Talk, listen
from vit_jax.errors import Lost, UserError
from vit_jax.io.text import printable

PATIENCE, STRANGERS = 5, 64
CERTAIN = 10  # seconds of wrong answers only, after which the port belongs to another program


def meet(place, facts, timeout):
    """Waits until all processes of a run have joined and returns a Meeting.

    Raises Lost after `timeout` seconds, with the missing processes, and UserError in all processes
    if two have the same index or `facts` differ.
    """
    hello = {'process': place.process, 'host': socket.gethostname(),
             'facts': {'processes': place.processes, **facts}}  # fmt: skip
    if place.process:
        answer, talks = ask(place, hello, timeout)
        bind = None
    else:
        host = Host(place, hello)
        answer, talks = host.gather(timeout)
        bind = place.coordinator if host.named else None
    if answer:
        for talk in talks.values():
            talk.close()
        raise Lost(answer['lost']) if 'lost' in answer else UserError(answer['mistake'])
    return Meeting(talks, place, bind)


class Host:
    """Process 0's side: the connections that it has identified and those that it has not yet."""

    def __init__(self, place, hello):
        self.processes, self.hello, self.answer = place.processes, hello, {}
        self.met, self.known = {}, []  # {process: its newest Talk}; all Talks of the job
        self.door, self.strangers = [], collections.Counter()
        self.selector = selectors.DefaultSelector()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = 2 * self.processes + STRANGERS + 500  # jax.distributed has as many connections
        if soft < files and hard != soft:
            most = files if hard == resource.RLIM_INFINITY else min(files, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        servers, self.where, self.named = listen(*place.address(), place.processes + STRANGERS)
        for server in servers:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ)

    def gather(self, timeout):
        """(answer to all processes, {process: Talk}) once all have joined or the time is over."""
        deadline = time.monotonic() + timeout
        while len(self.met) < self.processes - 1 and (now := time.monotonic()) < deadline:
            for key, _ in self.selector.select(min(0.5, deadline - now)):
                self.attend(key.data) if key.data else self.admit(key.fileobj)
            for talk in [t for t in self.door if time.monotonic() - t.since > PATIENCE]:
                self.dismiss(talk, 'silent')
            if self.answer:  # an error, which the last processes are to receive, too
                deadline = min(deadline, time.monotonic() + PATIENCE)
        missing = sorted(set(range(1, self.processes)) - self.met.keys())
        if missing and not self.answer:
            self.answer = {'lost': f'{names(missing)} of {self.processes} did not start within '
                           f'{timeout:g} s (--start_timeout); process 0 listened at {self.where}'
                           f'{self.turned_away()}'}  # fmt: skip
        elif self.strangers:
            print(f'process 0 listened at {self.where}{self.turned_away()}', file=sys.stderr)
        for talk in self.known:
            with contextlib.suppress(OSError):
                talk.say(**self.answer)
        for key in list(self.selector.get_map().values()):
            if key.data not in self.met.values():
                key.fileobj.close()
        self.selector.close()
        return self.answer, self.met

    def admit(self, server):
        """Accepts a connection; drops the oldest unidentified one if there are too many."""
        if len(self.door) >= self.processes + STRANGERS:
            self.dismiss(self.door[0], 'silent')
        try:
            connection, (peer, *_) = server.accept()
        except OSError:  # it was closed again, or too many files are open
            if self.door:
                self.dismiss(self.door[0], 'silent')
            return
        self.door.append(talk := Talk(connection, '0', peer))
        self.selector.register(connection, selectors.EVENT_READ, talk)

    def attend(self, talk):
        """Handles the lines of a connection."""
        if talk.connection.fileno() < 0:  # closed since the select
            return
        try:
            for line in talk.read():
                if talk.theirs is None:
                    talk.reply(line, host=self.hello['host'])
                elif talk.record is None:
                    self.know(talk, self.checked(talk.opened(line)))
        except Stranger as e:
            self.dismiss(talk, str(e))
        except OSError:
            self.dismiss(talk, f'left: another {SECRET}?' if talk.theirs else 'left')

    def checked(self, record):
        """The record by which a process identifies itself; raises Stranger if it is malformed."""
        i, host, facts = (record.get(key) for key in ('process', 'host', 'facts'))
        if not (type(i) is int and isinstance(host, str) and isinstance(facts, dict)):
            raise Stranger('other words')
        if i < 1 or i > 10**6 or i >= self.processes == facts.get('processes'):
            raise Stranger('other words')
        return record

    def know(self, talk, record):
        """Registers a process of the job, and notes an error if it does not belong to this run."""
        self.door.remove(talk)
        self.known.append(talk)
        talk.record, i = record, record['process']
        self.answer = self.answer or mistake(self.hello, record, self.met.get(i))
        self.met[i] = talk

    def dismiss(self, talk, why):
        """Closes the connection of a stranger, which is counted, or of a process that has ended."""
        self.selector.unregister(talk.connection)
        talk.close()
        if talk in self.door:
            self.door.remove(talk)
            known = talk.peer if len(self.strangers) < 1000 else 'elsewhere'
            self.strangers[known, why] += 1
        elif talk in self.known:
            self.known.remove(talk)
            self.met = {i: other for i, other in self.met.items() if other is not talk}

    def turned_away(self):
        """Summary: '; turned away 3 strangers: 2 from 10.0.0.7 (silent), 1 from ...', or ''."""
        if not self.strangers:
            return ''
        most = [f'{n} from {peer} ({why})' for (peer, why), n in self.strangers.most_common(4)]
        more = ', ...' if len(self.strangers) > len(most) else ''
        return f'; turned away {self.strangers.total()} strangers: {", ".join(most)}{more}'


def mistake(hello, found, other):
    """The answer if a process does not belong to process 0's run, else {}."""
    host = printable(found['host'])[:100]
    who = f'process {found["process"]} ({host})'
    for key, value in hello['facts'].items():
        if found['facts'].get(key) != value:
            its = printable(found['facts'].get(key))[:200]
            return {'mistake': f'{who} has another {key} than process 0 ({hello["host"]}): '
                    f'{its}, not {value}'}  # fmt: skip
    if other is not None:
        return {'mistake': f'two processes say that they are number {found["process"]}: on '
                f'{printable(other.record["host"])[:100]} and {host}'}  # fmt: skip
    return {}


def ask(place, hello, timeout):
    """The side of any other process: returns (process 0's answer, {0: Talk})."""
    begun, wrong, silent, told = time.monotonic(), None, None, False
    why, said = '', b''
    deadline = begun + timeout
    while (now := time.monotonic()) < deadline:
        talk = None
        try:
            talk = Talk(socket.create_connection(place.address(), deadline - now), 'i')
            talk.call()
            talk.record = talk.wait(min(deadline, time.monotonic() + PATIENCE))
            talk.theirs = talk.record['nonce']
            talk.say(**hello)
            return talk.wait(deadline + 10), {0: talk}  # process 0 may have started a little later
        except (Stranger, KeyError, OSError) as e:
            why = getattr(e, 'strerror', None) or str(e)
            if talk is None:  # nothing listens there
                wrong = silent = None
            else:
                talk.close()
                said = talk.said or said
                wrong = wrong or (talk.said and now)
                silent = silent or now
            if isinstance(e, socket.gaierror) and now - begun > CERTAIN and not told:
                told = True
                print(f'waiting for process 0 at {place.coordinator}: {why}', file=sys.stderr)
        if wrong and now - wrong > CERTAIN:
            return {'mistake': another(place, said)}, {}
        if silent and now - silent > 6 * CERTAIN:
            break
        time.sleep(0.2)
    waited = f'{min(timeout, time.monotonic() - begun):.3g} s'
    return {'lost': f'process 0 did not answer at {place.coordinator} within {waited} '
            f'(--start_timeout): {why}'}, {}  # fmt: skip


def another(place, said):
    """Why process 0 can't be reached if its port gave the wrong answer `said`."""
    if SEALED.match(said.decode('ascii', 'replace')):
        return (f'process 0 at {place.coordinator} has another {SECRET} than this process, or '
                'belongs to another job')  # fmt: skip
    return (f'{place.coordinator} is held by another program, which says {said!r}: process 0 can '
            'not listen there; give another port')  # fmt: skip


class Meeting:
    """Connections of the processes that have joined, until jax.distributed has started in all.

    Attributes:
        bind: HOST:PORT at which process 0 listened. None: at all its addresses, or not process 0.
    """

    def __init__(self, talks, place, bind):
        self.talks, self.place, self.bind, self.over = talks, place, bind, threading.Event()

    @contextlib.contextmanager
    def watched(self, limit, lost):
        """In the block, calls lost(why) if another process ends or is silent for `limit` s."""
        threading.Thread(target=self.watch, args=(limit, lost), daemon=True).start()
        try:
            yield
        except RuntimeError as e:
            why = str(e).partition('\n')[0]
            why = f'process {self.place.process} could not start jax.distributed: {why}'
            self.tell(lost=why)
            self.talks = {}
            raise Lost(why) from e
        self.over.set()

    def tell(self, **body):
        for talk in self.talks.values():
            with contextlib.suppress(OSError):
                talk.say(**body)

    def watch(self, limit, lost):
        """Thread that reads from the others until they have started, too.

        A connection that is closed earlier may lose its last message.
        """
        heard, why = dict.fromkeys(self.talks, time.monotonic()), None
        while self.talks and not why:
            time.sleep(0.5)
            over = self.over.is_set()
            for i, talk in list(self.talks.items()):
                who = f'process {i} of {self.place.processes} ({printable(talk.record["host"])})'
                try:
                    talk.say(**{'started' if over else 'alive': True})
                    bodies = [talk.opened(line) for line in talk.read()]
                except (OSError, Stranger):
                    self.talks.pop(i).close()
                    why = why or f'{who} ended before jax.distributed had started'
                    continue
                heard[i] = time.monotonic() if bodies else heard[i]
                silence = time.monotonic() - heard[i]
                if silence > limit:
                    why = why or f'{who} has not been heard of for {silence:.0f} s, at its start'
                for body in bodies:
                    why = body.get('lost') or why
                    if over and 'started' in body and i in self.talks:
                        self.talks.pop(i).close()
            why = None if over else why  # hosts.Watch has begun
        if why:
            self.tell(lost=why)
            time.sleep(1.5)  # until the others have received it
            lost(why)


def names(processes):
    """Names processes in a message: 'process 1' or 'processes 1, 2, 5'."""
    listed = ', '.join(map(str, processes[:20])) + (' ...' if len(processes) > 20 else '')
    return f'process {listed}' if len(processes) == 1 else f'processes {listed}'
