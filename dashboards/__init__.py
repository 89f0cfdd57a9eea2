"""Grafana's dashboards as code: what they show is written here, the JSON beside it is generated.

``build`` is the command. ``overview``, ``pool``, ``statements`` and ``objectives`` say what stands on
the four boards, with ``upkeep`` and ``itself`` for the lower rows of the pool's, and ``shared`` for what
several have; ``panels`` and ``board`` say how all of them look, ``limits`` has the figures that alerts
have, too. ``queries`` reads the generated files and knows nothing of the rest.
"""

import warnings

# At import the SDK asks for its dashboards of the second version, which Grafana 11 cannot read.
warnings.filterwarnings("ignore", "Prefer using dashboardv2", DeprecationWarning)
