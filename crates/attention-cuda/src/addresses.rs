//! Where the tensors of a call are in device memory.

use attention_core::{
    BackwardInputs, BackwardOutputs, Device, ForwardOutputs, Inputs, Role, Unsupported, View, ViewMut,
};
use cudarc::driver::CudaStream;

use crate::owned::check_streams;

/// The roles that tensors of a call have, those of scales behind the others.
const ROLES: usize = Role::ALL.len() + Role::SCALES.len();

/// An address for each role; 0 for the tensors that a call has not, and for numbers ([`Role::is_data`]) in
/// host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses([u64; ROLES]);

impl Addresses {
    /// Of a forward call.
    pub fn of_forward(inputs: &Inputs<'_>, outputs: &mut ForwardOutputs<'_>) -> Self {
        let mut all = Self::of_inputs(inputs);
        all.0[Role::Out as usize] = outputs.out.as_mut_ptr() as u64;
        all.write(Role::Lse, &mut outputs.lse);
        all
    }

    /// Of a backward call.
    pub fn of_backward(
        inputs: &Inputs<'_>,
        saved: &BackwardInputs<'_>,
        outputs: &mut BackwardOutputs<'_>,
    ) -> Self {
        let mut all = Self::of_inputs(inputs);
        all.read(Role::Out, Some(&saved.out));
        all.read(Role::Lse, Some(&saved.lse));
        all.read(Role::DOut, Some(&saved.d_out));
        all.read(Role::DLse, saved.d_lse.as_ref());
        all.write(Role::DQuery, &mut outputs.dq);
        all.write(Role::DKey, &mut outputs.dk);
        all.write(Role::DValue, &mut outputs.dv);
        all.write(Role::DBias, &mut outputs.dbias);
        all.write(Role::DSinks, &mut outputs.dsinks);
        all
    }

    fn of_inputs(inputs: &Inputs<'_>) -> Self {
        let mut all = Self::default();
        all.read(Role::Query, Some(&inputs.query));
        all.read(Role::Key, Some(&inputs.key));
        all.read(Role::Value, Some(&inputs.value));
        all.read(Role::Mask, inputs.mask.as_ref());
        all.read(Role::Bias, inputs.bias.as_ref());
        all.read(Role::AlibiSlopes, inputs.alibi_slopes.as_ref());
        all.read(Role::Sinks, inputs.sinks.as_ref());
        let data = &inputs.data;
        for (role, view) in [
            (Role::QueryLengths, &data.query_lengths),
            (Role::KeyValueLengths, &data.key_value_lengths),
            (Role::QueryOffsets, &data.query_offsets),
            (Role::DropoutSeed, &data.dropout_seed),
            (Role::DropoutOffset, &data.dropout_offset),
            (Role::QueryStarts, &data.query_starts),
            (Role::KeyValueStarts, &data.key_value_starts),
            (Role::BlockTable, &data.block_table),
            (Role::KeyScales, &data.key_scales),
            (Role::ValueScales, &data.value_scales),
        ] {
            all.read(role, view.as_ref().filter(|view| view.device() != Device::Cpu));
        }
        all
    }

    fn read(&mut self, role: Role, view: Option<&View<'_>>) {
        self.0[role as usize] = view.map_or(0, |view| view.as_ptr() as u64);
    }

    fn write(&mut self, role: Role, view: &mut Option<ViewMut<'_>>) {
        self.0[role as usize] = view.as_mut().map_or(0, |view| view.as_mut_ptr() as u64);
    }

    /// The address of a tensor, 0 where the call has none of this role.
    pub fn at(&self, role: Role) -> u64 {
        self.0[role as usize]
    }

    /// The tensors of the call, with their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (Role, u64)> {
        Role::ALL.into_iter().chain(Role::SCALES).zip(self.0).filter(|&(_, address)| address != 0)
    }

    /// Checks that the tensors, and the scratch at this address, may be used by work on this stream:
    /// that those of this crate's types were made on the same. Memory of another owner passes.
    ///
    /// # Errors
    /// [`Unsupported::Limit`], which names the tensor.
    pub fn check_streams(&self, backend: &str, stream: &CudaStream, scratch: u64) -> Result<(), Unsupported> {
        check_streams(backend, stream, scratch, self.iter())
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{CallData, DType, TensorDesc};

    use super::*;

    #[test]
    fn numbers_have_addresses_where_they_are_in_device_memory() {
        let (data, numbers, mut out) = ([0.0f32; 1], [1i64, 2], [0.0f32; 1]);
        let view = View::from_slice(&data, [1; 4]).unwrap();
        let on_device = |index: usize| {
            let desc = TensorDesc::contiguous(DType::I32, [1]);
            let pointer = std::ptr::without_provenance(4096 * index);
            // SAFETY: the view is asked for its address alone.
            unsafe { View::from_raw_parts(pointer, Device::Cuda(0), desc) }.ok()
        };
        let data = CallData {
            query_lengths: on_device(1),
            key_value_lengths: View::from_slice(&numbers, [2]).ok(),
            query_offsets: on_device(2),
            dropout_seed: on_device(3),
            dropout_offset: on_device(4),
            key_scales: View::from_slice(&data, [1]).ok(),
            value_scales: on_device(5),
            ..CallData::default()
        };
        let inputs = Inputs { data, ..Inputs::new(view, view, view) };
        let out = ViewMut::from_slice(&mut out, [1; 4]).unwrap();
        let all = Addresses::of_forward(&inputs, &mut ForwardOutputs { out, lse: None });
        assert_eq!(Role::DATA.map(|role| all.at(role)), [4096, 0, 2 * 4096, 3 * 4096, 4 * 4096]);
        assert_eq!(Role::SCALES.map(|role| all.at(role)), [0, 5 * 4096]);
        let numbers = [
            Role::QueryLengths,
            Role::QueryOffsets,
            Role::DropoutSeed,
            Role::DropoutOffset,
            Role::ValueScales,
        ];
        assert!(all.iter().map(|(role, _)| role).filter(|role| role.is_data()).eq(numbers));
    }

    #[test]
    fn each_tensor_is_found_by_its_role() {
        let data = [0.0f32; 8];
        let (mut out, mut lse) = ([0.0f32; 1], [0.0f32; 1]);
        let view = |index: usize| View::from_slice(&data[index..=index], [1; 4]).unwrap();
        let inputs =
            Inputs { mask: Some(view(3)), sinks: Some(view(4)), ..Inputs::new(view(0), view(1), view(2)) };
        let at = |index: usize| &raw const data[index] as u64;
        let (to_out, to_lse) = (out.as_ptr() as u64, lse.as_ptr() as u64);
        let mut outputs = ForwardOutputs {
            out: ViewMut::from_slice(&mut out, [1; 4]).unwrap(),
            lse: Some(ViewMut::from_slice(&mut lse, [1; 3]).unwrap()),
        };
        let forward = Addresses::of_forward(&inputs, &mut outputs);
        let expected = [
            (Role::Query, at(0)),
            (Role::Key, at(1)),
            (Role::Value, at(2)),
            (Role::Mask, at(3)),
            (Role::Sinks, at(4)),
            (Role::Out, to_out),
            (Role::Lse, to_lse),
        ];
        assert!(forward.iter().eq(expected));
        assert_eq!((forward.at(Role::Bias), forward.at(Role::Lse)), (0, to_lse));

        let mut gradients = [0.0f32; 5];
        let to: Vec<u64> = gradients.iter().map(|one| std::ptr::from_ref(one) as u64).collect();
        let mut each = gradients.chunks_mut(1).map(|one| Some(ViewMut::from_slice(one, [1; 4]).unwrap()));
        let mut next = || each.next().unwrap();
        let mut outputs =
            BackwardOutputs { dq: next(), dk: next(), dv: next(), dbias: next(), dsinks: next() };
        let saved = BackwardInputs { out: view(5), lse: view(6), d_out: view(7), d_lse: Some(view(0)) };
        let backward = Addresses::of_backward(&inputs, &saved, &mut outputs);
        let read = [(Role::Out, 5), (Role::Lse, 6), (Role::DOut, 7), (Role::DLse, 0)];
        assert!(read.into_iter().all(|(role, index)| backward.at(role) == at(index)));
        let gradients = [Role::DQuery, Role::DKey, Role::DValue, Role::DBias, Role::DSinks];
        assert!(gradients.into_iter().map(|role| backward.at(role)).eq(to));
    }
}
