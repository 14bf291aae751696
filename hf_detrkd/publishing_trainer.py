"""A `Trainer` that publishes what it trained."""

from __future__ import annotations

from transformers import Trainer

from .publishing import open_for, push_folder, repository_of


class PublishingTrainer(Trainer):
    """Everything is on disk before the first byte is sent, and errors say what to do."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer's, with an error that says what to do; a repository of another kind of model is refused."""
        if self.is_world_process_zero():
            self.hub_model_id = open_for(self.args, token=token, private=private)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata,
    ):
        """Saves the plain student, its image processor and a card, and pushes them. Always waits for the end.

        Raises:
            PushError: the student is on disk; the message has the command that pushes it again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(**metadata)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id or repository_of(self.args),
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            write=lambda name: self.create_model_card(**{**metadata, "model_name": name}),
        )
