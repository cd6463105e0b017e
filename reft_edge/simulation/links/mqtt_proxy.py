"""A broker's front door that repeats, delays and reorders messages, within the rules that `disorder` states."""

from __future__ import annotations

from reft_edge.simulation.links.conversation import Conversation
from reft_edge.simulation.links.disorder import Disorder, DisorderCounters, DisorderedConversation
from reft_edge.simulation.links.tcp_proxy import TcpProxy


class MqttProxy(TcpProxy):
    """A `TcpProxy` for MQTT 3.1.1 and 5 without TLS, whose messages it must read."""

    def __init__(
        self,
        target_host: str,
        target_port: int,
        disorder: Disorder,
        *,
        port: int = 0,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
    ) -> None:
        super().__init__(target_host, target_port, port=port, delay_s=delay_s, bytes_per_s=bytes_per_s)
        self._disorder = disorder
        self._n_conversations = 0
        self.counters = DisorderCounters()

    def _converse(self) -> Conversation:
        self._n_conversations += 1
        return DisorderedConversation(self._disorder, self._n_conversations, self.counters)
