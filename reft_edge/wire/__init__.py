"""The protocol: messages, topics, codecs, transfers and the MQTT adapter. Never imports torch."""
