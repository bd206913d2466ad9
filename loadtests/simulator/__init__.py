"""A discrete-event simulator of a fleet of inference engines behind gateways that run the production routing code.

Nothing here decides anything: requests go where a `routing.types.Policy` says, and the policy learns what becomes of
them by its four events. What is modelled is the engines, the network, the traffic and the gossip between gateways.
"""
