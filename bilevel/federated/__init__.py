"""Federated bilevel optimization: clients whose data never leave them, and what they tell a server."""

from bilevel.federated.aggitd import AggITD as AggITD
from bilevel.federated.clients import AbstractClients as AbstractClients, Clients as Clients
from bilevel.federated.federate import Federated as Federated, Reached as Reached, federate as federate
from bilevel.federated.fednest import FedNest as FedNest
from bilevel.federated.local_steps import local_steps as local_steps
from bilevel.federated.maml import FederatedMAML as FederatedMAML
from bilevel.federated.method import AbstractMethod as AbstractMethod
from bilevel.federated.on_ranks import ClientsOnRanks as ClientsOnRanks
from bilevel.federated.over_clients import OverClients as OverClients
from bilevel.federated.server import Participation as Participation, Server as Server, Traffic as Traffic
from bilevel.federated.soba import FederatedSOBA as FederatedSOBA
from bilevel.federated.splits import dirichlet_split as dirichlet_split, stacked as stacked
