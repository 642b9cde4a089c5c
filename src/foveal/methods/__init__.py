"""The methods of sparse attention. Each registers itself when its folder is imported; a new one is a line here."""

from foveal.methods import sla as sla
from foveal.methods import sla2 as sla2
from foveal.methods import sla_vsa as sla_vsa
from foveal.methods import vsa as vsa
