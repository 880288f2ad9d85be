//! What an optimizer computes, one file a rule.
//!
//! A file has the rule's hyperparameters ([`Hyperparameters`]), which prepare the constants of a step in double
//! precision, and those constants with the update of one element ([`Rule`]) in plain fp32. A rule enters everything else by its line in
//! `rules!`: kernels, state tensors, checks.

mod adagrad;
mod adam;
mod hyperparameters;
mod lion;
mod sgd;

use std::fmt::Debug;

use zeroxide_layout::Moment;

use crate::codec::moments::Remembered;
use crate::error::OptimError;
use crate::kernel::Task;

pub(crate) use hyperparameters::{Fields, Range, Setting, hyperparameters};
pub use hyperparameters::{Hyperparameter, Value};

/// The constants of one step of one rule, which all elements share, with the update of one element.
pub(crate) trait Rule: Copy + PartialEq + Debug {
    /// Element of the rule's first tensor; `()` where it has none.
    type First: Remembered;
    /// Element of its second one; `()` where it has none.
    type Second: Remembered;

    /// The new weight and state. A weight that is NaN has any payload: the codec makes it canonical; moments are
    /// canonical.
    fn update(
        &self,
        weight: f32,
        state: (Self::First, Self::Second),
        gradient: f32,
    ) -> (f32, (Self::First, Self::Second));
}

/// The hyperparameters of a rule.
pub(crate) trait Hyperparameters: Fields + Copy + Default + PartialEq + Debug {
    /// What a user calls the rule in a parameter group.
    const NAME: &'static str;
    /// What people call the rule.
    const TITLE: &'static str;
    /// The constants of one step.
    type Step: Prepared;

    /// The rule's tensors, in the order of [`Rule::First`] and [`Rule::Second`].
    fn moments(&self) -> Vec<Moment>;

    /// Checks every field against the range where the update is defined, and what must go together.
    fn validate(&self) -> Result<(), OptimError> {
        self.in_range()
    }

    /// Prepares step number `step`, counted from 1. `grad_scale` multiplies every gradient first.
    fn prepare(&self, step: u64, grad_scale: f64) -> Self::Step;
}

/// A prepared step: the constants of a [`Rule`], or a choice between rules.
pub(crate) trait Prepared: Copy + PartialEq + Debug {
    /// Applies the step to a tile: calls [`Task::apply`] with a [`Rule`].
    fn run(&self, task: &mut Task<'_, '_, '_>);
}

impl<R: Rule> Prepared for R {
    fn run(&self, task: &mut Task<'_, '_, '_>) {
        task.apply(self);
    }
}

macro_rules! rules {
    ($($(#[doc = $about:literal])* $name:ident($file:ident::$params:ident)),* $(,)?) => {
        $(pub use $file::$params;)*

        /// An optimizer rule with its hyperparameters.
        #[derive(Clone, Copy, PartialEq, Debug)]
        pub enum Optimizer {
            $($(#[doc = $about])* $name($params)),*
        }

        /// One step's worth of precomputed constants; see [`Optimizer::prepare`].
        #[derive(Clone, Copy, PartialEq, Debug)]
        pub struct Step(Steps);

        #[derive(Clone, Copy, PartialEq, Debug)]
        enum Steps {
            $($name(<$params as Hyperparameters>::Step)),*
        }

        impl Optimizer {
            /// Every rule, with its default hyperparameters.
            pub fn every() -> Vec<Self> {
                vec![$(Self::$name(<$params>::default())),*]
            }

            /// What a user calls the rule.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => <$params as Hyperparameters>::NAME),* }
            }

            /// What people call the rule.
            pub fn title(&self) -> &'static str {
                match self { $(Self::$name(_) => <$params as Hyperparameters>::TITLE),* }
            }

            /// What the rule is, in one line.
            pub fn about(&self) -> &'static str {
                match self { $(Self::$name(_) => concat!($($about),*).trim()),* }
            }

            /// The rule's hyperparameters.
            pub fn hyperparameters(&self) -> Vec<Hyperparameter> {
                match self { $(Self::$name(_) => <$params as Fields>::fields()),* }
            }

            /// Sets the hyperparameter of that name, in any range; `false` where the rule has none, or one of another
            /// type.
            pub fn set(&mut self, name: &str, value: Value) -> bool {
                match self { $(Self::$name(params) => params.set(name, value)),* }
            }

            /// The rule's own state tensors, with the values that they start from.
            pub fn moments(&self) -> Vec<Moment> {
                match self { $(Self::$name(params) => params.moments()),* }
            }

            /// Checks every hyperparameter against the range where the update is defined.
            pub fn validate(&self) -> Result<(), OptimError> {
                match self { $(Self::$name(params) => params.validate()),* }
            }

            /// Prepares step number `step`, counted from 1, as torch's `state["step"]` is after the update.
            ///
            /// `grad_scale` multiplies every gradient first: `1 / loss_scale`, times the clip factor.
            ///
            /// # Panics
            /// If `step` is zero.
            pub fn prepare(&self, step: u64, grad_scale: f64) -> Step {
                assert!(step >= 1, "steps are counted from 1");
                Step(match self { $(Self::$name(params) => Steps::$name(params.prepare(step, grad_scale))),* })
            }
        }

        impl Step {
            pub(crate) fn run(&self, task: &mut Task<'_, '_, '_>) {
                match &self.0 { $(Steps::$name(step) => step.run(task)),* }
            }
        }

        $(impl From<$params> for Optimizer {
            fn from(params: $params) -> Self {
                Self::$name(params)
            }
        })*
    };
}

rules! {
    /// Adam (Kingma and Ba 2015, algorithm 1) and `AdamW` (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim` has
    /// them.
    Adam(adam::AdamParams),
    /// Lion (Chen et al. 2023, algorithm 2), with decoupled weight decay.
    Lion(lion::LionParams),
    /// Adagrad (Duchi, Hazan and Singer 2011), as `torch.optim.Adagrad` computes it.
    Adagrad(adagrad::AdagradParams),
    /// SGD with momentum, as `torch.optim.SGD` computes it.
    Sgd(sgd::SgdParams),
}

/// A tensor of a rule, of values of either sign, that starts at zero.
pub(crate) fn signed(name: &'static str) -> Moment {
    Moment {
        key: zeroxide_layout::StateKey::new(name),
        signed: true,
        initial: 0.0,
    }
}

/// A tensor of a rule, of values that are never negative, that starts at `initial`.
pub(crate) fn unsigned(name: &'static str, initial: f32) -> Moment {
    Moment {
        key: zeroxide_layout::StateKey::new(name),
        signed: false,
        initial,
    }
}

/// A constant as the nearest fp32 value.
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
pub(crate) fn nearest(constant: f64) -> f32 {
    constant as f32
}
