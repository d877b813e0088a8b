from tests.fakes.lease_contract import LeaseContract


class TestLeases(LeaseContract): ...
