//! The order in which an automatic choice asks: the registry's, corrected by what was measured.

use std::sync::Arc;

use attention_core::{AttentionBackend, Problem};

use super::crossovers::Crossover;
use super::devices::DeviceClass;

/// The class of the device that backends for a problem's memory work on: as those say that are available,
/// before those that only assume one.
pub(crate) fn device_class(backends: &[Arc<dyn AttentionBackend>], problem: &Problem) -> DeviceClass {
    let of_kind =
        || backends.iter().filter(|backend| backend.capabilities().device == problem.device().kind());
    let here = of_kind().filter(|backend| backend.available().is_ok());
    DeviceClass::of(here.chain(of_kind()).find_map(|backend| backend.compute_capability()))
}

/// Orders candidates for a problem on a device: where a crossover applies, its winner moves right before its
/// loser. Gives the crossovers that decided, of those whose implementations are both there: the last one that
/// applies of each pair.
pub(crate) fn order<'t>(
    backends: &mut Vec<Arc<dyn AttentionBackend>>,
    problem: &Problem,
    device: DeviceClass,
    table: &'t [Crossover],
) -> Vec<&'t Crossover> {
    let mut decided: Vec<&Crossover> = Vec::new();
    for rule in table.iter().filter(|rule| rule.devices.contains(&device) && (rule.applies)(problem)) {
        let place = |name: &str| backends.iter().position(|backend| backend.name() == name);
        let (Some(winner), Some(loser)) = (place(rule.faster), place(rule.slower)) else { continue };
        decided.retain(|other| !other.is_of(rule.faster) || !other.is_of(rule.slower));
        decided.push(rule);
        if loser < winner {
            let backend = backends.remove(winner);
            backends.insert(loser, backend);
        }
    }
    decided
}
