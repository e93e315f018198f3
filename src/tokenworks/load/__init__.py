"""The load generator against any OpenAI-compatible endpoint: what `tokenworks bench` does.

It measures as a client does and knows neither the twin nor the gateway.
"""
