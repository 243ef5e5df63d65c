//! The memory that a call writes to.

use attention_core::{BackwardOutputs, ForwardOutputs, Pass, Problem, Role, ViewMut};

use super::Stop;
use crate::cases::Layouts;
use crate::oracle::Padding;
use crate::tensor::{HostTensor, unravel};

/// Every output of a call, poisoned with NaN and surrounded by canaries until the call has written it.
#[derive(Clone, Debug)]
pub(crate) struct Results(Vec<(Role, HostTensor)>);

impl Results {
    /// The outputs of a problem. `layouts` are those that the problem was made with; none for contiguous
    /// ones.
    pub(crate) fn poisoned(problem: &Problem, layouts: Option<&Layouts>) -> Self {
        let roles: &[Role] = match problem.pass() {
            Pass::Forward => &[Role::Out, Role::Lse],
            Pass::Backward => &[Role::DQuery, Role::DKey, Role::DValue, Role::DBias, Role::DSinks],
        };
        let tensor = |role: Role| {
            let desc = problem.tensor(role)?;
            let layout = layouts.map_or_else(Default::default, |layouts| layouts.of(role));
            Some((role, HostTensor::poisoned(desc, layout)))
        };
        Self(roles.iter().filter_map(|&role| tensor(role)).collect())
    }

    /// The output of this role, if the call has it.
    pub(crate) fn get(&self, role: Role) -> Option<&HostTensor> {
        self.iter().find(|(candidate, _)| *candidate == role).map(|(_, tensor)| tensor)
    }

    /// Every output.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Role, &HostTensor)> {
        self.0.iter().map(|(role, tensor)| (*role, tensor))
    }

    /// The outputs of the padded call: of a packed or paged one, after a look at the rows that no sequence
    /// has.
    pub(crate) fn padded(self, padding: Option<&Padding>) -> Result<Self, Stop> {
        let Some(padding) = padding else { return Ok(self) };
        let tensor = |(role, tensor): (Role, HostTensor)| {
            let Some(places) = padding.places(role) else { return Ok((role, tensor)) };
            let empty = if role == Role::Lse { f64::NEG_INFINITY } else { 0.0 };
            let (taken, shape) = (places.taken(), tensor.desc().shape());
            let row: usize = shape[2..].iter().product();
            for (index, value) in
                tensor.values().into_iter().enumerate().filter(|(index, _)| !taken[index / row])
            {
                if value != empty {
                    let at = unravel(index, &shape);
                    let got = if tensor.is_unwritten(index) {
                        "never written".into()
                    } else {
                        format!("{value:e}")
                    };
                    return Err(Stop::failed(format!("{role}{at:?} is {got}, in a row of no sequence")));
                }
            }
            Ok((role, places.pad(&tensor, empty)))
        };
        self.0.into_iter().map(tensor).collect::<Result<_, _>>().map(Self)
    }

    /// Takes an output out.
    pub(crate) fn take(&mut self, role: Role) -> Option<HostTensor> {
        let index = self.0.iter().position(|(candidate, _)| *candidate == role)?;
        Some(self.0.swap_remove(index).1)
    }

    pub(crate) fn forward(&mut self) -> ForwardOutputs<'_> {
        let [mut out, mut lse] = [None, None];
        for (role, tensor) in &mut self.0 {
            match role {
                Role::Out => out = Some(tensor.view_mut()),
                _ => lse = Some(tensor.view_mut()),
            }
        }
        ForwardOutputs { out: out.expect("every forward call has an output"), lse }
    }

    pub(crate) fn backward(&mut self) -> BackwardOutputs<'_> {
        let mut outputs = BackwardOutputs::default();
        for (role, tensor) in &mut self.0 {
            let slot: &mut Option<ViewMut<'_>> = match role {
                Role::DQuery => &mut outputs.dq,
                Role::DKey => &mut outputs.dk,
                Role::DValue => &mut outputs.dv,
                Role::DBias => &mut outputs.dbias,
                _ => &mut outputs.dsinks,
            };
            *slot = Some(tensor.view_mut());
        }
        outputs
    }

    /// Whether a refused call has left everything alone.
    pub(crate) fn expect_untouched(&self, what: &str) -> Result<(), Stop> {
        match self.iter().find(|(_, tensor)| !tensor.is_untouched()) {
            Some((role, _)) => Err(Stop::failed(format!("{what} wrote to {role}"))),
            None => Ok(()),
        }
    }

    /// Whether nothing outside the outputs' elements was written.
    pub(crate) fn expect_no_stray_writes(&self) -> Result<(), Stop> {
        for (role, tensor) in self.iter() {
            if let Some(at) = tensor.first_stray_write() {
                let strides = tensor.desc().strides();
                return Err(Stop::failed(format!(
                    "wrote outside the elements of {role}, at {at} elements from its first (strides {strides})"
                )));
            }
        }
        Ok(())
    }
}
