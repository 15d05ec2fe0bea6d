"""Any order of commands, deliveries and answers: two honest ends never fail each other, and no end lets a hostile one break it.

What must hold about memory is checked by the `Shell` and the `World` at each step.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fuzz.fuzz_vmbus import guest_messages, host_messages
from tests.vmbus.world import World, nic
from vfio_vmbus.errors import ProtocolError, RescindedError, UsageError
from vfio_vmbus.vmbus import GuestState, HostLimits, HostState, whole_pages
from vfio_vmbus.wire import vmbus as wire

LIMITS = HostLimits(max_offers=6, max_gpadls=4, max_gpadl_pages=60, max_total_pages=100, max_unfinished=40, target_vps=4)
PROFILE = settings(max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RELIDS = st.integers(1, 6)
STATUS = st.sampled_from([0, 0, 0, wire.STATUS_UNSUCCESSFUL])


class Connection(RuleBasedStateMachine):
    """What the honest and the hostile machines have in common: the host's own commands, deliveries, the shell's answers."""

    @initialize(version=st.sampled_from(wire.SUPPORTED_VERSIONS), at_once=st.booleans())
    def begin(self, version, at_once):
        self.world = World(LIMITS, max_version=version)
        self.world.shell.at_once = at_once
        self.world.start(nic(1), nic(2), nic(1, 1))

    @rule(number=st.integers(1, 3), index=st.integers(0, 2))
    def offer(self, number, index):
        try:
            _, actions = self.world.host.offer(nic(number, index))
        except UsageError:
            return
        self.world.shell.do(actions)

    @precondition(lambda self: self.world.host.relids)
    @rule(data=st.data())
    def rescind(self, data):
        relid = data.draw(st.sampled_from(self.world.host.relids))
        try:
            self.world.shell.do(self.world.host.rescind(relid))
        except UsageError:
            return

    @precondition(lambda self: self.world.shell.asked)
    @rule(data=st.data(), status=STATUS)
    def shell_answers(self, data, status):
        self.world.shell.answer(data.draw(st.integers(0, len(self.world.shell.asked) - 1)), status)

    @invariant()
    def nothing_beyond_the_limits(self):
        if hasattr(self, "world"):
            assert len(self.world.host.relids) <= LIMITS.max_offers
            assert len(self.world.shell.mapped) <= LIMITS.max_gpadls

    def teardown(self):
        if hasattr(self, "world"):
            self.world.shell.end()


class Honest(Connection):
    """Every delivery succeeds, because both ends keep to the protocol whatever crosses on the way."""

    def attempt(self, command, *arguments):
        """A command that cannot work now has no effect."""
        before = len(self.world.guest.gpadl_handles)
        try:
            result = command(*arguments)
        except (UsageError, RescindedError):
            assert len(self.world.guest.gpadl_handles) == before
            return
        self.world.post(result[1] if isinstance(result, tuple) else result)

    @precondition(lambda self: self.world.to_host)
    @rule(count=st.integers(1, 5))
    def deliver_to_host(self, count):
        for _ in range(min(count, len(self.world.to_host))):
            self.world.deliver_to_host()

    @precondition(lambda self: self.world.shell.sent)
    @rule(count=st.integers(1, 5))
    def deliver_to_guest(self, count):
        for _ in range(min(count, len(self.world.shell.sent))):
            self.world.deliver_to_guest()

    @rule(relid=RELIDS, pages=st.sampled_from([1, 4, 8, 30, 61]))
    def create(self, relid, pages):
        self.attempt(self.world.guest.create_gpadl, relid, [whole_pages(range(pages))])

    @precondition(lambda self: self.world.guest.gpadl_handles)
    @rule(data=st.data())
    def tear_down(self, data):
        self.attempt(self.world.guest.teardown_gpadl, data.draw(st.sampled_from(self.world.guest.gpadl_handles)))

    @precondition(lambda self: self.world.guest.gpadl_handles)
    @rule(data=st.data(), relid=RELIDS, offset=st.sampled_from([2, 2, 2, 6, 9]), vp=st.sampled_from([None, 0, 3, 4]))
    def open(self, data, relid, offset, vp):
        handle = data.draw(st.sampled_from(self.world.guest.gpadl_handles))
        self.attempt(self.world.guest.open_channel, relid, handle, offset, vp)

    @rule(relid=RELIDS)
    def close(self, relid):
        self.attempt(self.world.guest.close_channel, relid)

    @rule(relid=RELIDS, vp=st.integers(0, 3))
    def modify(self, relid, vp):
        # Before 5.3 a refusal has no answer, so that a driver must know what it can ask for: no interrupts, no move.
        if self.world.guest.version == wire.VERSION_WIN10_V5_3:
            self.attempt(self.world.guest.modify_channel, relid, vp)

    @rule(relid=RELIDS)
    def release(self, relid):
        self.attempt(self.world.guest.release_relid, relid)

    @rule()
    def unload(self):
        self.attempt(self.world.guest.unload)

    @precondition(lambda self: self.world.guest.state is GuestState.DISCONNECTED)
    @rule()
    def connect(self):
        self.attempt(self.world.guest.connect)

    @precondition(lambda self: self.world.guest.state is GuestState.CONNECTED)
    @rule()
    def request_offers(self):
        self.attempt(self.world.guest.request_offers)

    @rule()
    def settle(self):
        """When nothing is under way, both ends believe the same."""
        world = self.world
        world.run()
        if world.guest.state is GuestState.RUNNING:
            assert set(world.guest.gpadl_handles) == set(world.host.gpadl_handles)
            assert set(world.guest.open_relids) == set(world.host.open_relids)
            assert set(world.guest.relids) == set(world.host.relids)
            assert set(world.shell.running) == set(world.guest.open_relids)


class HostileGuest(Connection):
    """Any message at any time: actions or ProtocolError, then a reset and a new beginning."""

    @rule(message=guest_messages())
    def receive(self, message):
        host, shell = self.world.host, self.world.shell
        if host.state is HostState.FAILED:
            shell.do(host.reset())
            return
        try:
            shell.do(host.receive(message.pack()))
        except ProtocolError:
            assert host.state is HostState.FAILED

    @precondition(lambda self: self.world.host.state in (HostState.DISCONNECTED, HostState.UNLOADED, HostState.CONNECTED))
    @rule()
    def begin_anew(self):
        request = wire.InitiateContact(version_requested=self.world.guest.version, target_info=wire.TargetInfo.of(sint=2))
        if self.world.host.state in (HostState.DISCONNECTED, HostState.UNLOADED):
            self.world.shell.do(self.world.host.receive(request.pack()))
        self.world.shell.do(self.world.host.receive(wire.RequestOffers().pack()))


class HostileHost(RuleBasedStateMachine):
    """Any message at any time to a driver at work: events or ProtocolError, and its books agree with each other."""

    @initialize(version=st.sampled_from(wire.SUPPORTED_VERSIONS))
    def begin(self, version):
        self.world = World(max_version=version)
        self.world.start(nic(1), nic(2))
        self.world.open(1)
        self.world.gpadl(2)

    @rule(message=host_messages())
    def receive(self, message):
        guest = self.world.guest
        if guest.state is GuestState.FAILED:
            self.begin(self.world.host.version)
            return
        try:
            guest.receive(message.pack())
        except ProtocolError:
            assert guest.state is GuestState.FAILED

    @rule(data=st.data(), what=st.integers(0, 6))
    def work(self, data, what):
        guest = self.world.guest
        relid = data.draw(st.sampled_from(guest.relids or (1,)))
        handle = data.draw(st.sampled_from(guest.gpadl_handles or (1,)))
        try:
            (
                lambda: guest.create_gpadl(relid, [whole_pages(range(8))]),
                lambda: guest.teardown_gpadl(handle),
                lambda: guest.open_channel(relid, handle, 4),
                lambda: guest.close_channel(relid),
                lambda: guest.modify_channel(relid, 1),
                lambda: guest.release_relid(relid),
                guest.unload,
            )[what]()
        except (UsageError, RescindedError):
            assert guest.state is not GuestState.FAILED
        except ProtocolError:
            assert guest.state is GuestState.FAILED

    @invariant()
    def books_agree(self):
        if hasattr(self, "world"):
            guest = self.world.guest
            per_channel = [handle for channel in guest._channels.values() for handle in channel.gpadls]
            assert sorted(per_channel) == sorted(guest.gpadl_handles)
            assert set(guest.open_relids) <= set(guest.relids)


TestHonest = Honest.TestCase
TestHonest.settings = PROFILE
TestHostileGuest = HostileGuest.TestCase
TestHostileGuest.settings = PROFILE
TestHostileHost = HostileHost.TestCase
TestHostileHost.settings = PROFILE
