//! Tensors are stored by the name of their role, so that roles can join without changing what is stored already.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Role, TensorDesc};

type Tensors = [Option<TensorDesc>; Role::COUNT];

pub(super) fn serialize<S: Serializer>(tensors: &Tensors, serializer: S) -> Result<S::Ok, S::Error> {
    let by_role: BTreeMap<Role, &TensorDesc> =
        Role::ALL.into_iter().zip(tensors).filter_map(|(role, desc)| Some((role, desc.as_ref()?))).collect();
    by_role.serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Tensors, D::Error> {
    let mut tensors = [None; Role::COUNT];
    for (role, desc) in BTreeMap::<Role, TensorDesc>::deserialize(deserializer)? {
        tensors[role as usize] = Some(desc);
    }
    Ok(tensors)
}
